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


def requeue(job_id: str, exclude: Sequence[str], fewest_tasks: int | None, by_slurm: bool = False) -> bool:
    """Ask Slurm to run this job again, without the nodes of `exclude`; return whether it agreed.

    `fewest_tasks`: with how many tasks it may start; None leaves that. Slurm keeps the number of the first start, and
    a job that had all its nodes then never starts on fewer (seen with 22.05). `by_slurm`: it does run it again.
    """
    already = ask.job_fields(job_id).get("ExcNodeList", "(null)")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a requeue ends this script, and us before we have excluded
    if not by_slurm and ask.slurm("scontrol", "requeue", job_id) is None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return False
    names = ",".join([*([] if already == "(null)" else [already]), *exclude])
    changes = [*([f"excnodelist={names}"] if exclude else []),
               *([f"numtasks={fewest_tasks}"] if fewest_tasks is not None else [])]
    end = time.monotonic() + PATIENCE_S
    # refused until the job is pending
    while changes and ask.slurm("scontrol", "update", f"jobid={job_id}", *changes) is None:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return True


def follow_up(environment: Mapping[str, str], starts: Starts, words: Sequence[str], keep_nodes: bool) -> str:
    """Submit this job's own script again, to start when this one has ended; return what to say about it.

    `words` follow the script; `keep_nodes` leaves the number of nodes to the script's own lines.
    """
    job_id, run = environment["SLURM_JOB_ID"], starts.folder.path
    fields = ask.job_fields(job_id)
    element = environment.get("SLURM_ARRAY_TASK_ID")
    # what may have been given to sbatch on its command line
    asked = {"nodes": "" if keep_nodes else fields.get("NumNodes"), "partition": fields.get("Partition"),
             "account": environment.get("SLURM_JOB_ACCOUNT"), "time": fields.get("TimeLimit"), "array": element,
             "ntasks-per-node": environment.get("SLURM_NTASKS_PER_NODE"), "exclude": ",".join(starts.bad_nodes())}
    options = [f"--{name}={value}" for name, value in asked.items() if value]
    script = starts.folder.submission / "follow-up.sh"
    if ask.slurm("scontrol", "write", "batch_script", job_id, str(script)) is None:
        return f"requeue refused, and no copy of the script; submit again with --run {run} to go on"
    done = subprocess.run(["sbatch", "--parsable", f"--dependency=afterany:{job_id}", *options, str(script), *words],
                          env={**without_launchers(environment), "RUN": str(run)}, capture_output=True, text=True,
                          check=False)
    if done.returncode:
        return f"requeue and follow-up job are refused ({done.stderr.strip()}); submit again with --run {run} to go on"
    new_id = done.stdout.strip().partition(";")[0]
    old, new = job_id, new_id
    if element is not None:
        old, new = f"{environment['SLURM_ARRAY_JOB_ID']}_{element}", f"{new_id}_{element}"
    pickles = Path(environment.get("HPCPAR_PICKLES", starts.folder.submission))
    if (pickle := pickles / f"{old}_submitted.pkl").exists():  # submitit looks for it under the new job's id
        os.link(pickle, pickles / f"{new}_submitted.pkl")
    return f"requeue refused; job {new_id} goes on when this one has ended"
