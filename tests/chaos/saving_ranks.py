"""Ranks that save sets in a loop, torch-free, until someone kills them: mpirun -n 4 python THIS FOLDER TP PP DP.

Every step is saved twice, so that half of the saves replace a published set. Save n holds the reference values times n.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mpi4py import MPI

from hpcpar.checkpoint import latest_set, load_shards, read_state, save_set, verify_together
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
    while True:
        number += 1
        save_set(folder, number // 2, layout, control.rank, control, times(base, number), {"save": number}, keep=2)
        if control.rank == 0:
            os.write(told, b"%d\n" % number)  # to a file: the launcher, which forwards stdout, may be dead


def times(shards: dict, number: int) -> dict:
    return {kind: [flat * flat.dtype.type(number) for flat in flats] for kind, flats in shards.items()}


main()
