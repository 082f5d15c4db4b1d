"""Does `layout.tp_overlap` put exchanges beside products? A real step of one tp rank, its link replaced by a clock.

    python benchmarks/tp_overlap.py [--tp 4] [--share 0.3] [--pieces 1 2 4 8]

The rank computes as in training; its exchanges over tp carry nothing, and end when a link of known speed would have
brought them, one after the other, while the cores are free: as between GPUs, whose copies take (nearly) none of their
multiprocessors. The link is as fast as makes all exchanges together take `share` of the computation. Exposed is what a
step takes longer than with a link that takes no time, pieces alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hpcpar.comm.groups import open_groups
from hpcpar.comm.silent_backend import SilentGroup, silent_world
from hpcpar.config.job import Job
from hpcpar.config.load import override
from hpcpar.config.resolve import resolve
from hpcpar.layout.layout import Layout
from hpcpar.layout.traffic import Call, wire_bytes
from hpcpar.parallel.build import build, initialise
from hpcpar.train.state import Progress
from hpcpar.train.step import Trainee, train_step


class Link:
    """Carries one exchange after the other."""

    def __init__(self, bytes_per_s: float = math.inf):
        self.bytes_per_s, self.free_at, self.num_bytes = bytes_per_s, 0.0, 0.0

    def carry(self, num_bytes: float) -> dist.Work:
        """Begin now, or when the link is free."""
        self.free_at = max(time.perf_counter(), self.free_at) + num_bytes / self.bytes_per_s
        self.num_bytes += num_bytes
        return Due(self.free_at)


class Due(dist.Work):
    """Is done at a point of time."""

    def __init__(self, at: float):
        super().__init__()
        self._at = at

    def is_completed(self) -> bool:
        """Whether that time has come."""
        return time.perf_counter() >= self._at

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Sleep until then."""
        time.sleep(max(0.0, self._at - time.perf_counter()))
        return True


class ClockedGroup(SilentGroup):
    """A tp group whose exchanges take the link's time."""

    def __init__(self, rank: int, size: int, link: Link):
        super().__init__(rank, size)
        self.link = link

    def carried(self, operation: str, whole: Tensor) -> dist.Work:
        """Send this rank's part, as a ring does."""
        return self.link.carry(wire_bytes(Call(operation, "tp", whole.nbytes), self.size()))


def job_of(tp: int, pieces: int) -> Job:
    """Make a job of four wide layers on one pipeline stage."""
    return resolve(override(
        Job(), model={"layers": 4, "hidden": 2048, "heads": 16, "seq": 1024, "vocab": 1024},
        layout={"tp": tp, "dp": 1, "tp_overlap": pieces, "zero": 0},
        train={"global_batch": 1, "precision": "fp32"}))


def step_s(tp: int, pieces: int, link: Link, steps: int) -> float:
    """Return the median seconds of a step; the link counts the bytes of one."""
    with silent_world(tp, 0):
        layout = Layout(job_of(tp, pieces))
        groups = open_groups(layout.mesh, 0)
        clocked = dataclasses.replace(groups, tp=ClockedGroup(0, tp, link))
        pipeline, optimizer = build(layout, clocked, torch.device("cpu"))
        initialise(optimizer, 1)
        trainee, progress, found = Trainee(layout, clocked, pipeline, optimizer, torch.device("cpu")), Progress(), []
        for _ in range(1 + steps):
            link.num_bytes, start = 0.0, time.perf_counter()
            train_step(trainee, progress, lambda numbers: np.zeros((len(numbers), layout.job.model.seq + 1), np.int64))
            found.append(time.perf_counter() - start)
        groups.close()
    return statistics.median(found[1:])


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.3, help="of the computation that whole exchanges would take")
    parser.add_argument("--pieces", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    instant = Link()
    whole = step_s(args.tp, 1, instant, args.steps)
    busy_s = args.share * whole
    link = Link(instant.num_bytes / busy_s)
    print(f"one rank of tp {args.tp}: a step of {whole:.3f} s, exchanges of {instant.num_bytes / 2**20:.0f} MiB in "
          f"{busy_s:.3f} s\n\n| pieces | s a step, no link | with it | exposed s | of the exchanges hidden |\n"
          "|---|---|---|---|---|")
    runs: dict[int, list[tuple[float, float]]] = {pieces: [] for pieces in args.pieces}
    for _ in range(args.repeat):
        for pieces in args.pieces:
            alone, linked = (step_s(args.tp, pieces, each, args.steps) for each in (Link(), link))
            runs[pieces].append((alone, linked))
    for pieces, pairs in runs.items():
        alone, linked = (statistics.median(each) for each in zip(*pairs, strict=True))
        exposed = [b - a for a, b in pairs]
        print(f"| {pieces} | {alone:.3f} | {linked:.3f} | {statistics.median(exposed):.3f} "
              f"({min(exposed):.3f}-{max(exposed):.3f}) | {1 - statistics.median(exposed) / busy_s:.0%} |")


if __name__ == "__main__":
    main()
