"""Four ranks, tp 2 x dp 2, that talk through torch.distributed over MPI until one meets the fate it was given."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from hpcpar.comm.bootstrap import connect, open_process_group
from hpcpar.comm.collectives import gather_flat
from hpcpar.comm.groups import Groups, open_groups
from hpcpar.comm.watch import Watch
from hpcpar.config.job import Health
from hpcpar.config.run_folder import RunFolder
from hpcpar.config.surroundings import Surroundings
from hpcpar.layout.mesh import Mesh

UNLUCKY, STEP = 3, 17
LIMIT_S = 2.0


def first(groups: Groups, size: int = 1000) -> None:
    dist.all_reduce(torch.ones(size), group=groups.tp)


def second(groups: Groups, size: int = 3000) -> None:
    part = torch.ones(size)
    gather_flat(part.new_empty(2 * size), part, groups.tp)


def third(groups: Groups) -> None:
    dist.all_reduce(torch.ones(10), group=groups.dp)


def step(groups: Groups, fate: str) -> None:
    if fate == "swap":
        second(groups)
        first(groups)
    else:
        first(groups, 1001 if fate == "shape" else 1000)
        if fate != "skip":
            second(groups)
    if fate == "skip-last":
        return
    third(groups)


def meet(fate: str) -> None:
    if fate == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fate == "sleep":
        time.sleep(1000)
    if fate == "busy":  # three times the limit, at work: it survives
        end = time.monotonic() + 3 * LIMIT_S
        while time.monotonic() < end:
            pass


def main() -> None:
    fate, run = sys.argv[1], RunFolder(Path(sys.argv[2]))
    world = connect(Surroundings.read(os.environ))
    unlucky = 0 if fate == "busy" else UNLUCKY
    host = f"host-{world.rank // 2}" if "--two-hosts" in sys.argv else socket.gethostname()
    mesh = Mesh(dp_size=2, tp_size=2)
    health = Health(step_limit_s=LIMIT_S)
    with Watch.start(run, world.control, host, mesh, world.abort, health) as watch:
        open_process_group(world)
        groups = open_groups(mesh, world.rank)
        world.control.barrier()
        for number in range(30):
            watch.note(step=number, phase="step", action=f"F{number % 4}")
            mine = fate if (world.rank, number) == (unlucky, STEP) else ""
            meet(mine)
            step(groups, mine)
            time.sleep(1.0 if (fate == "shape" and number > STEP) or "--long" in sys.argv else 0.01)
        watch.note(phase="finish")
        world.control.barrier()


main()
