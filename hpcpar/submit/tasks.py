"""What submitit pickles and runs: a path, and how to train what lies there."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

WANTS_TO_GO_ON = 75  # exit code: stopped cleanly and saved, before all steps were done


@dataclass(frozen=True)
class TrainTask:
    """One rank of a Slurm job: trains the run folder's job, and asks for a requeue where there is more to do.

    submitit runs it in every task of `srun`. Until the training loop has set its own, submitit's signal handlers
    hold: they call `checkpoint` and requeue.
    """

    run: str

    def __call__(self) -> int:
        """Train; return 0 (done) or 75 (stopped, requeued), and leave with any other code, which ends the job."""
        code = _enter(["train", f"{self.run}/config.toml", "--run", self.run])
        if code not in (0, WANTS_TO_GO_ON):
            raise SystemExit(code)
        # not a bad exit: srun would kill the slower ranks, and rank 0 before it could requeue
        if code == WANTS_TO_GO_ON and os.environ.get("SLURM_PROCID") == "0":
            self.requeue()
        return code

    def requeue(self) -> None:
        """Ask Slurm to run this job again, unless somebody ended it on purpose."""
        job_id = os.environ["SLURM_JOB_ID"]
        asked = subprocess.run(["squeue", "-h", "-j", job_id, "-o", "%T"], check=False, capture_output=True, text=True)
        state = asked.stdout.strip()
        if os.path.exists(f"{self.run}/STOP"):  # noqa: PTH110  (a string travels better in a pickle than a Path)
            self._say(f"stopped by {self.run}/STOP; not requeued")
        elif state not in ("RUNNING", ""):  # scancel stops us by a signal too, and a requeue would undo it
            self._say(f"the job is {state}; not requeued")
        elif subprocess.run(["scontrol", "requeue", job_id], check=False).returncode:
            self._say(f"requeue refused; submit again with --run {self.run} to go on")

    def _say(self, text: str) -> None:
        print(f"hpcpar: {text}", file=sys.stderr, flush=True)

    def checkpoint(self) -> Any:
        """Return what submitit runs after a requeue of its own: the same task, for the run folder has all state."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class LocalTask:
    """A whole run on this machine: one process that plays the run folder's script, which becomes `mpirun`."""

    script: str

    def __call__(self) -> int:
        """Run the script; return 0 (done) or 75 (stopped cleanly), and leave with any other code."""
        process = subprocess.Popen(["bash", self.script])

        def stop(_number: int, _frame: FrameType | None) -> None:
            # The one signal that both MPICH's and Open MPI's mpirun hand on to the ranks: USR2 ends MPICH's mpirun
            # itself, TERM makes Open MPI's kill them
            process.send_signal(signal.SIGUSR1)

        stops = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
        before = {number: signal.signal(number, stop) for number in stops}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if code not in (0, WANTS_TO_GO_ON):
            raise SystemExit(code)
        return code


def _enter(words: list[str]) -> int:
    """Do in this process, a rank, what `python -m hpcpar.entry WORDS` does in its own; return its exit code."""
    sys.argv[1:] = words
    try:
        runpy.run_module("hpcpar.entry", run_name="__main__")  # the door is started, as by the shell, not imported
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    return 0
