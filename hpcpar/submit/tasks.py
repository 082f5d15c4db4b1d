"""What runs on every rank of a Slurm job, and what submitit pickles for it: a path."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

WANTS_TO_GO_ON = 75  # exit code: stopped cleanly and saved, before all steps were done
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class TrainTask:
    """One rank of a Slurm job: trains the run folder's job. submitit runs it in every task of `srun`."""

    run: str

    def __call__(self) -> int:
        """Train; return 0 (done) or 75 (stopped, there is more to do), and leave with any other code."""
        dp = os.environ.get("HPCPAR_DP")  # set by `batch start` where an elastic job got fewer nodes
        return train(["train", f"{self.run}/submit/job.toml", "--run", self.run, *(["--layout.dp", dp] if dp else [])])

    def checkpoint(self) -> Any:
        """Return what submitit runs after a requeue of its own: the same task, for the run folder has all state."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def train(words: Sequence[str]) -> int:
    """Be one rank of `hpcpar train`: where there is more to do, rank 0 leaves a mark for the batch script.

    A clean stop must not look like a bad exit: srun would kill the ranks that are slower to leave.
    """
    mark = Path(words[words.index("--run") + 1]) / "submit" / "go-on" if os.environ.get("SLURM_PROCID") == "0" else None

    def stop_before_training(_number: int, _frame: FrameType | None) -> None:
        if mark:
            mark.touch()
        os._exit(0)  # no step was taken: nothing to save, and the others have been told as well

    if os.environ.get("SLURM_LOCALID") == "0":
        remove_stale_segments(Path("/dev/shm"))
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # not TERM: by that srun ends the ranks beside one that failed
        signal.signal(number, stop_before_training)
    code = _enter(words)
    if code not in (0, WANTS_TO_GO_ON):
        raise SystemExit(code)
    if code == WANTS_TO_GO_ON and mark:
        mark.touch()
    return code


def remove_stale_segments(folder: Path) -> None:
    """Remove our shared-memory files of MPICH that no process maps: what killed ranks have left on this node.

    MPICH names them after Slurm's job and step, which are the same after a requeue; one left by a job with other ranks
    a node makes MPI_Init say "Out of memory". A node's first rank makes them, so it clears the way.
    """
    old = time.time() - 5  # one younger may be about to be mapped
    stale = {str(path) for path in folder.glob("mpich_shm_*") if _is_ours(path, old)}
    for maps in Path("/proc").glob("[0-9]*/maps") if stale else ():
        try:
            stale -= {word for line in maps.read_text().splitlines() if (word := line.rpartition(" ")[2]) in stale}
        except OSError:
            continue  # it has ended, or is not ours
    # The scan took its time: where nodes share a host, another's first rank may have made a new one of the same name
    for path in filter(lambda path: _is_ours(path, old), map(Path, stale)):
        path.unlink(missing_ok=True)


def _is_ours(path: Path, old: float) -> bool:
    """Return whether a file belongs to this user and was last written before `old`."""
    try:
        found = path.lstat()
    except FileNotFoundError:  # another job's first rank clears the way too
        return False
    return found.st_uid == os.geteuid() and found.st_mtime < old


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

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, *STOPS)}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if code not in (0, WANTS_TO_GO_ON):
            raise SystemExit(code)
        return code


def _enter(words: Sequence[str]) -> int:
    """Do in this process, a rank, what `python -m hpcpar.entry WORDS` does in its own; return its exit code."""
    sys.argv[1:] = words
    try:
        runpy.run_module("hpcpar.entry", run_name="__main__")  # the door is started, as by the shell, not imported
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    return 0


if __name__ == "__main__":
    train(sys.argv[1:])
