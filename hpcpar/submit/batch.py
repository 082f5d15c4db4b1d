"""What a batch script calls on its first node, before and after srun: slurm/train.sbatch and `hpcpar submit` alike.

    python -m hpcpar.submit.batch start RUN [FOLDER OF PICKLES]    prints lines for the shell to eval
    python -m hpcpar.submit.batch judge RUN CODE [WORDS]          the same, after the prologue on every node
    python -m hpcpar.submit.batch end RUN CODE [WORDS OF THE SCRIPT]

`end` decides what comes next: nothing (done, failed for good, ended by a person), a requeue, or, where Slurm refuses
to requeue, a follow-up job. Where the first node is lost, `heir` does that on another.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcpar.config.job import Job
from hpcpar.config.load import load_job
from hpcpar.config.run_folder import RunFolder
from hpcpar.config.surroundings import mpi_network
from hpcpar.errors import HpcparError, UserError
from hpcpar.planner.hardware import load_machine
from hpcpar.submit import ask
from hpcpar.submit.health import LIMIT_S, Wanted, judge, read_reports
from hpcpar.submit.requeue import follow_up, requeue
from hpcpar.submit.spec import fewest_nodes, for_fewer_nodes
from hpcpar.submit.starts import Starts, check_private

WANTS_TO_GO_ON = 75  # exit code: stopped cleanly and saved, before all steps were done
ON_PURPOSE = ("RunError", "UserError", "CheckpointError")  # the run ended itself: another start would do the same
TOLD_TO_STOP = tuple(128 + number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))  # as srun tells it
ASKED_TO_STOP = TOLD_TO_STOP[1:]  # by TERM srun also ends the ranks beside one that failed
BROKEN_GPU = ("CUDA error", "uncorrectable", "ECC", "NVLink", "Xid")


class Batch:
    """One batch script, and the run that it is for."""

    def __init__(self, run: Path, environment: Mapping[str, str]):
        self.starts, self.environment = Starts(RunFolder(run.absolute())), environment
        self.job_id, self.own_id = environment["SLURM_JOB_ID"], ask.own_id(environment)
        self.nodes = ask.host_names(environment.get("SLURM_JOB_NODELIST", ""))

    def start(self, pickles: Path | None) -> str:
        """Look after what an earlier start has left; return shell lines. Raises UserError where it cannot start."""
        folder = self.starts.folder
        folder.create()
        folder.submission.mkdir(mode=0o700, exist_ok=True)
        check_private(folder.path, folder.submission, *([pickles] if pickles else []))
        self.starts.nodes.mkdir(exist_ok=True)
        for report in self.starts.nodes.glob("*.json"):
            report.unlink()  # an earlier start's
        self.starts.go_on.unlink(missing_ok=True)
        self.starts.heir.unlink(missing_ok=True)
        if earlier := self._ended_by_slurm():
            self.remember(ask.lost_nodes(earlier["nodes"], earlier["time"]))
        bad = sorted(self.starts.bad_nodes().keys() & set(self.nodes))
        if bad and self._can_exclude(bad) and self.requeue():
            self._say(f"{', '.join(bad)} let this run down before; requeued without")
            return "exit 0"
        network = [f"export {name}={shlex.quote(value)}" for name, value in mpi_network(self.environment).items()]
        lines = "\n".join(filter(None, [*network, self._fewer_ranks()]))
        self.starts.note(job=self.job_id, restart=int(self.environment.get("SLURM_RESTART_COUNT", 0)),
                         nodes=self.nodes)
        return lines

    def _ended_by_slurm(self) -> dict[str, Any] | None:
        """Return the last start's line unless that start ended by itself, or was requeued by us.

        Where the batch script's own node is well, `end` still comes to write that the job stays as Slurm leaves it.
        Where another node acted for it, others may be lost as well.
        """
        lines = self.starts.lines()
        began = next((line for line in reversed(lines) if "nodes" in line), None)
        left = lines and (lines[-1] is began or ({"stays", "heir"} & lines[-1].keys()
                                                 and lines[-1]["job"] == self.job_id))
        return began if left else None

    def judge(self, code: int, words: Sequence[str]) -> str:
        """Read what the prologue has left; go on without the bad nodes where that can be; return shell lines.

        `code` is that of the prologue's srun, `words` those of the script.
        """
        if code in TOLD_TO_STOP:
            self.starts.go_on.touch()
            self.end(0, words)
            return "exit 0"
        folder, nodes = self.starts.nodes, self.nodes[:int(self.environment.get("SLURM_JOB_NUM_NODES", 1 << 30))]
        found = judge(read_reports(folder, nodes), self._wanted())
        for line in found.lines:
            self._say(f"prologue: {line}")
        if not found.bad:
            return ""
        self.remember(found.bad)
        if self._can_exclude([*self.starts.bad_nodes()]) and self.requeue():
            self.starts.note(job=self.job_id, unfit=sorted(found.bad))
            self._say(f"requeued without {', '.join(found.bad)}")
            return "exit 0"
        self._say(f"goes on with {', '.join(found.bad)}")
        return ""

    def _wanted(self) -> Wanted:
        """Return what the job as submitted expects of a node; on CPUs, and in train.sbatch, they are only compared."""
        machine = self.job().machine
        if machine.gpu == "cpu" or self.environment.get("HPCPAR_CPU") == "1":
            return Wanted()
        try:
            return Wanted(machine.gpus_per_node, load_machine(machine.gpu))
        except UserError:  # a GPU that the planner does not know
            return Wanted(machine.gpus_per_node)

    def end(self, code: int, words: Sequence[str]) -> int:
        """Decide what comes after srun's exit code; return the job's."""
        going_on = self.starts.go_on.exists()  # written when all ranks had saved: stronger than the code
        began, state = self.starts.began(), ask.job_fields(self.own_id).get("JobState", "RUNNING")
        # what Slurm is killing died of that
        lost = {} if going_on or code == 0 or state != "RUNNING" else self._culprits(began)
        self.remember(lost)
        stay = self._why_not_again(code, going_on, state, began, lost)
        self.starts.note(job=self.job_id, end=code, **({"stays": stay} if stay else {}))
        if stay:
            self._say(stay)
            return code or (WANTS_TO_GO_ON if going_on else 0)
        if code == 0 and not going_on:
            return 0
        if not self.requeue():
            self._say(follow_up(self.environment, self.starts, words, keep_nodes=self.elastic()))
        return 0 if going_on else code

    def _why_not_again(self, code: int, going_on: bool, state: str, began: float, lost: Mapping[str, str]) -> str:
        """Say why the run stays where it is, or return an empty string."""
        if self.starts.folder.stop.exists():
            return f"stopped by {self.starts.folder.stop}; not requeued"
        if state != "RUNNING":  # cancelled by a person, or Slurm requeues it itself
            return f"the job is {state}; not requeued"
        if going_on or code == 0:
            return ""
        failure = self.starts.failure(began)
        if code == 2 or (failure and failure["error"] in ON_PURPOSE):
            return "it would fail again in the same way; not requeued"
        retries, tries = self.job().submit.retries, self.starts.fruitless()
        if failure is None and code not in ASKED_TO_STOP and tries == 1 <= retries:
            # in the start of Python or MPI; that can be chance, such as a PMI message torn in two
            self._say("ended before any rank could say why; tried once more")
            return ""
        if not lost and (failure is None or failure["step"] is None):
            return "failed before its first step; not requeued"
        return f"{tries} starts in a row have saved nothing new; not requeued" if tries > retries else ""

    def _culprits(self, began: float) -> dict[str, str]:
        """Name the nodes that this start failed on: those that Slurm has lost, and the one of the rank that died."""
        lost = ask.lost_nodes(self.nodes, began)
        failure = self.starts.failure(began)
        if failure and (failure["error"] == "Died" or any(word in failure["message"] for word in BROKEN_GPU)):
            a_node = re.match(r"\d+", self.environment.get("SLURM_NTASKS_PER_NODE")
                              or self.environment.get("SLURM_TASKS_PER_NODE", ""))
            index = failure["rank"] // int(a_node.group()) if a_node else len(self.nodes)
            if index < len(self.nodes):
                lost.setdefault(self.nodes[index], f"rank {failure['rank']}: {failure['message']}")
        return lost

    def remember(self, lost: dict[str, str]) -> None:
        """Write down, and say, which nodes are not to be used again, and why."""
        self.starts.add_bad_nodes(lost)
        for name, why in lost.items():
            self._say(f"{name} let this run down ({why})")

    def requeue(self) -> bool:
        """Have Slurm run the job again as this run wants it; return whether it does."""
        bad, job = [*self.starts.bad_nodes()], self.job()
        fewest = fewest_nodes(job) * job.machine.gpus_per_node if job.submit.elastic else None
        return requeue(self.own_id, bad if bad and self._can_exclude(bad) else [], fewest)

    def _can_exclude(self, bad: Sequence[str]) -> bool:
        """Tell whether the partition has nodes enough without these."""
        found = (ask.partitions() or {}).get(self.environment.get("SLURM_JOB_PARTITION", ""))
        known = ask.partition(found) if found else None
        left = sum(node.name not in bad for node in known.nodes) if known and known.nodes else None
        needed = fewest_nodes(self.job()) if self.elastic() else len(self.nodes)
        if left is not None and left < needed:
            self._say(f"cannot do without {', '.join(bad)}: {left} other nodes, {needed} needed")
        return left is None or left >= needed

    def job(self) -> Job:
        """Return the job as submitted; what train.sbatch runs was not, and has made no wishes."""
        return load_job(self.starts.job) if self.starts.job.exists() else Job()

    def elastic(self) -> bool:
        """Return whether the job takes fewer nodes."""
        return self.job().submit.elastic

    def _fewer_ranks(self) -> str:
        """Return what an elastic job tells srun where it was given fewer nodes than it wished."""
        if not self.elastic():
            return ""
        job = self.job()
        smaller = for_fewer_nodes(job, len(self.nodes))
        if smaller is None:
            raise UserError("submit.elastic", f"{len(self.nodes)} nodes hold no legal layout", "see hpcpar show")
        if smaller.layout.dp == job.layout.dp:
            return ""
        self._say(f"elastic: {len(self.nodes)} of {job.machine.nodes} nodes: dp {smaller.layout.dp} instead of "
                  f"{job.layout.dp}, {smaller.world_size} ranks; samples and global batch stay the same")
        ranks, nodes = smaller.world_size, smaller.machine.nodes
        return (f"export SLURM_NTASKS={ranks} SLURM_NPROCS={ranks} SLURM_NNODES={nodes} SLURM_JOB_NUM_NODES={nodes} "
                f"HPCPAR_DP={smaller.layout.dp}")

    def _say(self, text: str) -> None:
        print(f"hpcpar: {text}", file=sys.stderr, flush=True)


def main(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Do `start`, `judge` or `end` of a batch script."""
    what, run, *rest = words
    try:
        batch = Batch(Path(run), environment)
        if what == "end":
            return batch.end(int(rest[0]), rest[1:])
        if what == "judge":
            print(batch.judge(int(rest[0]), rest[1:]))
            return 0
        print(batch.start(Path(rest[0]) if rest else None))
        return 0
    except HpcparError as error:
        print(f"hpcpar: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def before_srun(python: str, run: str, pickles: str) -> list[str]:
    """Return the lines that a script made by `hpcpar submit` has before all else; `run` is in the shell's words."""
    return [
        "trap : TERM USR1 USR2  # the ranks save and stop; this shell waits for them",
        f"run={run}",
        f"export HPCPAR_PICKLES={shlex.quote(pickles)}",
        f'lines=$({python} -m hpcpar.submit.batch start "$run" "$HPCPAR_PICKLES") || exit',
        'eval "$lines"',
    ]


def prologue(python: str, on_node: str, mpi: str) -> list[str]:
    """Return the lines that look at every node before srun starts the ranks; `on_node` starts Python there."""
    return [
        # overlap: a step that cannot be killed must not keep its cores and GPUs from the ranks
        f'timeout --kill-after=5 {LIMIT_S} srun --overlap --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 '
        f'--cpus-per-task=1 --mpi={mpi} {on_node} -m hpcpar.probe "$run/submit/nodes"',
        f'lines=$({python} -m hpcpar.submit.batch judge "$run" $?) || exit',
        'eval "$lines"',
    ]


def after_srun(python: str) -> list[str]:
    """Return the lines that such a script has after srun."""
    return [f'{python} -m hpcpar.submit.batch end "$run" $?']


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
