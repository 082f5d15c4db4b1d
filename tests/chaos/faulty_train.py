"""`hpcpar train` on which one fault falls: python faulty_train.py FAULT RANK STEP DELAY MARK train JOB --run DIR ...

The fault comes DELAY seconds into the STEP-th step of this start, wherever the rank is by then: in a forward, in a
collective, in a save. Just before, MARK is written with the time.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hpcpar import cli
from hpcpar.config.surroundings import Surroundings
from hpcpar.parallel.reduction import Gradient, Reduction
from hpcpar.parallel.zero import ShardedOptimizer


class Broken(Exception):
    """The error that is raised in the middle of anything."""


def end_main_thread() -> None:
    """Raise in the main thread, at its next instruction."""
    ident = threading.main_thread().ident
    assert ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(Broken))


def fill_disk() -> None:
    """Let the kernel refuse the rank's checkpoint writer every byte beyond the first KiB of a file."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == os.getpid() and b"hpcpar.checkpoint.writer" in command:
            resource.prlimit(int(process.name), resource.RLIMIT_FSIZE, (1024, 1024))


SUDDEN: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda: os._exit(7),
    "raise": end_main_thread,
}


def arm(fault: str, step: int, delay_s: float, mark: Path) -> None:
    """Make the fault happen on this rank."""
    begin, reduce, taken = ShardedOptimizer.begin, Reduction.start, [0]

    def note() -> None:
        mark.write_text(str(time.time()))

    def strike() -> None:
        time.sleep(delay_s)
        note()
        SUDDEN[fault]()

    def faulty_begin(self: ShardedOptimizer, *told: int) -> None:
        taken[0] += 1
        if fault == "slow":
            time.sleep(delay_s)
        elif taken[0] == step and fault in SUDDEN:
            threading.Thread(target=strike, daemon=True).start()
        elif taken[0] == step and fault == "disk":
            note()
            fill_disk()
        begin(self, *told)

    def faulty_reduce(self: Reduction, gradient: Gradient) -> None:
        if fault == "nan" and taken[0] == step:
            note()
            gradient.whole[0] = torch.nan
        reduce(self, gradient)

    ShardedOptimizer.begin, Reduction.start = faulty_begin, faulty_reduce  # type: ignore[method-assign]


if __name__ == "__main__":
    fault, rank, step, delay, mark = sys.argv[1:6]
    if Surroundings.read(os.environ).rank == int(rank) and fault != "none":
        arm(fault, int(step), float(delay), Path(mark))
    sys.exit(cli.main(sys.argv[6:]))
