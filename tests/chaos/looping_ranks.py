"""Four ranks that all-reduce in a loop until one of them meets the fate named on the command line."""

import ctypes
import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

from hpcpar.comm.control import OverMPI
from hpcpar.comm.watch import Watch
from hpcpar.config.run_folder import RunFolder
from hpcpar.errors import UserError
from hpcpar.layout.mesh import Mesh


def meet(fate: str, rank: int) -> None:
    if fate == "two-raise" and rank in (1, 2):
        raise ValueError("a bad number")
    if fate == "mistake":
        raise UserError("data.store", "no such folder")
    if rank != 2:
        return
    if fate in ("raise", "stale"):
        raise ValueError("a bad number")
    if fate == "raise-late":  # the others are inside the collective by now
        time.sleep(0.5)
        raise ValueError("a bad number")
    if fate == "exit":
        os._exit(7)
    if fate == "leave":
        sys.exit(5)
    if fate == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "segfault":
        ctypes.string_at(0)


def main() -> None:
    fate, run = sys.argv[1], RunFolder(Path(sys.argv[2]))
    world = MPI.COMM_WORLD
    # two pretended hosts: a witness each
    host = f"host-{world.rank // 2}" if "--two-hosts" in sys.argv else socket.gethostname()
    ones, total = np.ones(1 << 10), np.empty(1 << 10)
    orphaned = ("-c", f"open({str(run.path / 'orphaned')!r}, 'a').write('asked on {host}\\n')")
    with Watch.start(run, OverMPI(world), host, Mesh(pp_size=2, tp_size=2), world.Abort, orphaned=orphaned) as watch:
        for step in range(30):
            watch.note(step=step, phase="forward")
            if step == 17:
                meet(fate, world.rank)
            watch.note(action="all_reduce world 8 KiB")
            world.Allreduce(ones, total)
            time.sleep(0.01)


main()
