"""`hpcpar train` on which one fault falls: python faulty_train.py FAULT RANK STEP DELAY MARK train JOB --run DIR ...

The fault comes DELAY seconds into the STEP-th step of this start, wherever the rank is by then: in a forward, in a
collective, in a save. Just before, MARK is written with the time.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hpcpar import cli
from hpcpar.checkpoint import save as saving
from hpcpar.config.surroundings import Surroundings
from hpcpar.parallel.zero import ShardedOptimizer


class Broken(Exception):
    """The error that is raised in the middle of anything."""


def end_main_thread() -> None:
    """Raise in the main thread, at its next instruction."""
    ident = threading.main_thread().ident
    assert ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(Broken))


SUDDEN: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda: os._exit(7),
    "raise": end_main_thread,
}


def arm(fault: str, step: int, delay_s: float, mark: Path) -> None:
    """Make the fault happen on this rank."""
    begin, arm_reduction, taken = ShardedOptimizer.begin, ShardedOptimizer.arm, [0]

    def note() -> None:
        mark.write_text(str(time.time()))

    def strike() -> None:
        time.sleep(delay_s)
        note()
        SUDDEN[fault]()

    def full(*told: object, **more: object) -> None:
        note()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")

    def faulty_begin(self: ShardedOptimizer) -> None:
        taken[0] += 1
        if fault == "slow":
            time.sleep(delay_s)
        elif taken[0] == step and fault in SUDDEN:
            threading.Thread(target=strike, daemon=True).start()
        elif taken[0] == step and fault == "disk":
            saving.write_file = full  # type: ignore[assignment]
        begin(self)

    def faulty_arm(self: ShardedOptimizer) -> None:
        if fault == "nan" and taken[0] == step:
            note()
            self.buckets[0].grads[0] = torch.nan
        arm_reduction(self)

    ShardedOptimizer.begin, ShardedOptimizer.arm = faulty_begin, faulty_arm  # type: ignore[method-assign]


if __name__ == "__main__":
    fault, rank, step, delay, mark = sys.argv[1:6]
    if Surroundings.read(os.environ).rank == int(rank) and fault != "none":
        arm(fault, int(step), float(delay), Path(mark))
    sys.exit(cli.main(sys.argv[6:]))
