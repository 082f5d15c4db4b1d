"""What submitit pickles and runs on the node: a path, and how to train what lies there."""

from __future__ import annotations

import os
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
        from hpcpar import cli

        code = _exit_code(cli.main, ["train", f"{self.run}/config.toml", "--run", self.run])
        if code not in (0, WANTS_TO_GO_ON):
            raise SystemExit(code)
        # not a bad exit: srun would kill the slower ranks, and rank 0 before it could requeue
        if code == WANTS_TO_GO_ON and os.environ.get("SLURM_PROCID") == "0":
            self.requeue()
        return code

    def requeue(self) -> None:
        """Ask Slurm to run this job again, unless somebody stopped it by hand."""
        if os.path.exists(f"{self.run}/STOP"):  # noqa: PTH110  (a string travels better in a pickle than a Path)
            print(f"hpcpar: stopped by {self.run}/STOP; not requeued", file=sys.stderr, flush=True)
            return
        answer = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
        if answer.returncode:
            print(f"hpcpar: requeue refused; submit again with --run {self.run} to go on", file=sys.stderr, flush=True)

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
            # mpirun hands USR2 on to the ranks, which stop after this step; TERM and INT would kill them
            process.send_signal(signal.SIGUSR2)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if code not in (0, WANTS_TO_GO_ON):
            raise SystemExit(code)
        return code


def _exit_code(command: Any, words: list[str]) -> int:
    """Call the door's `main` and return its exit code, whether it returns or leaves with it."""
    try:
        code = command(words)
    except SystemExit as leave:
        code = leave.code
    return code if isinstance(code, int) else int(code is not None)


def main() -> int:
    """Run `hpcpar` with this interpreter: `python -m hpcpar.entry train JOB ...`."""
    from hpcpar import cli

    return _exit_code(cli.main, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
