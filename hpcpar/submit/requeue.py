"""The two ways to go on: the same job again, or a follow-up job where Slurm refuses that."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcpar.submit import ask
from hpcpar.submit.environment import without_launchers
from hpcpar.submit.starts import Starts

PATIENCE_S = 10.0


def requeue(own_id: str, exclude: Sequence[str], fewest_tasks: int | None) -> bool:
    """Have Slurm run this job again, without the nodes of `exclude`; return whether it does.

    `fewest_tasks`: with how many tasks it may start; None leaves that. Slurm keeps the number of the first start, and
    a job that had all its nodes then never starts on fewer (seen with 22.05).
    """
    already = ask.job_fields(own_id).get("ExcNodeList", "(null)")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a requeue ends this script, and us before we have excluded
    if ask.slurm("scontrol", "requeue", own_id) is None:
        job = ask.job_fields(own_id)
        if job.get("JobState", "RUNNING") == "RUNNING" or job.get("Requeue") == "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            return False
        # Slurm, which has missed a node, or somebody else was quicker
    names = ",".join([*([] if already == "(null)" else [already]), *exclude])
    changes = [*([f"excnodelist={names}"] if exclude else []),
               *([f"numtasks={fewest_tasks}"] if fewest_tasks is not None else [])]
    end = time.monotonic() + PATIENCE_S
    # refused until the job is pending
    while changes and ask.slurm("scontrol", "update", f"jobid={own_id}", *changes) is None:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return True


def follow_up(environment: Mapping[str, str], starts: Starts, words: Sequence[str], keep_nodes: bool) -> str:
    """Submit this job's own script again, to start when this one has ended; return what to say about it.

    `words` follow the script; `keep_nodes` leaves the number of nodes to the script's own lines.
    """
    own_id, run = ask.own_id(environment), starts.folder.path
    fields = ask.job_fields(own_id)
    element = environment.get("SLURM_ARRAY_TASK_ID")
    # what may have been given to sbatch on its command line
    asked = {"nodes": "" if keep_nodes else fields.get("NumNodes"), "partition": fields.get("Partition"),
             "account": environment.get("SLURM_JOB_ACCOUNT"), "chdir": fields.get("WorkDir"),
             "time": fields.get("TimeLimit"), "array": element,
             "ntasks-per-node": environment.get("SLURM_NTASKS_PER_NODE"), "exclude": ",".join(starts.bad_nodes())}
    options = [f"--{name}={value}" for name, value in asked.items() if value]
    script = starts.folder.submission / "follow-up.sh"
    if ask.slurm("scontrol", "write", "batch_script", own_id, str(script)) is None:
        return f"requeue refused, and no copy of the script; submit again with --run {run} to go on"
    inherited = {name: value for name, value in without_launchers(environment).items() if name != "HPCPAR_DP"}
    done = subprocess.run(["sbatch", "--parsable", f"--dependency=afterany:{own_id}", *options, str(script), *words],
                          env={**inherited, "RUN": str(run)}, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"requeue and follow-up job are refused ({done.stderr.strip()}); submit again with --run {run} to go on"
    new_id = done.stdout.strip().partition(";")[0]
    new = new_id if element is None else f"{new_id}_{element}"
    pickles = Path(environment.get("HPCPAR_PICKLES", starts.folder.submission))
    if (pickle := pickles / f"{own_id}_submitted.pkl").exists():  # submitit looks for it under the new job's id
        os.link(pickle, pickles / f"{new}_submitted.pkl")
    return f"requeue refused; job {new_id} goes on when this one has ended"
