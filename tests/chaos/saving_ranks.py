"""Ranks that save sets in a loop, torch-free, until they are killed: mpirun -n 4 python THIS FOLDER TP PP DP [async].

Every step is saved twice, so that half of the saves replace a published set. Save n holds the reference values times n.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from mpi4py import MPI

from hpcpar.checkpoint import latest_set, load_shards, read_state, verify_together
from hpcpar.checkpoint.background import BackgroundSaver
from hpcpar.checkpoint.save import save_now
from hpcpar.checkpoint.tasks import Saving, Tasks
from hpcpar.comm.control import OverMPI
from tests.checkpoint.sets import GPT, assert_equal, make_layout, shards_of

MODEL = {**GPT, "hidden": 64, "vocab": 3001}


def main() -> None:
    folder, control = Path(sys.argv[1]), OverMPI(MPI.COMM_WORLD)
    layout = make_layout(MODEL, *map(int, sys.argv[2:5]))
    base = shards_of(layout, control.rank)
    told = os.open(folder / "told", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    found, number = control.broadcast(latest_set(folder) if control.rank == 0 else None), 0
    if found is not None:
        number = read_state(found)["save"]
        verify_together(found, control)
        assert_equal(load_shards(found, layout, control.rank, "float32", verify=False), times(base, number))
    saving = Saving(folder, layout, keep=2)
    tasks = Tasks(saving, control.rank, {})
    background = BackgroundSaver(saving, control, dict.fromkeys(base, "float32")) if "async" in sys.argv else None
    while True:
        number += 1
        step, shards, state = number // 2, times(base, number), {"save": number}
        if background is None:
            tasks.shards = shards
            save_now(tasks, step, control, state)
        else:
            save_beside(background, control, step, shards, state)
        if control.rank == 0:
            os.write(told, b"%d\n" % number)  # to a file: the launcher, which forwards stdout, may be dead


def save_beside(background: BackgroundSaver, control: OverMPI, step: int, shards: dict, state: dict) -> None:
    """Save as the trainer does: go on with the save when no rank's writer is at work."""
    for kind, flats in shards.items():
        for copy, flat in zip(background.shards[kind], flats, strict=True):
            copy[:] = flat
    background.start(step, state)
    published = None
    while published is None:
        while control.largest(int(background.busy)):
            time.sleep(0.001)
        published = background.advance()
    background.finish()


def times(shards: dict, number: int) -> dict:
    return {kind: [flat * flat.dtype.type(number) for flat in flats] for kind, flats in shards.items()}


main()
