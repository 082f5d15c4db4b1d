"""How long a step loop stands still for an asynchronous save, beside one copy of the same bytes in memory.

    python benchmarks/stall.py [--gib 1] [--folder DIR] [--rounds 5]

One rank. Each round: a plain copy between two arrays that have been touched before, a save beside the loop (copy and
start: the stall; until published), and the same set saved synchronously.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpcpar.checkpoint.background import BackgroundSaver
from hpcpar.checkpoint.save import save_now
from hpcpar.checkpoint.tasks import Saving, Tasks
from hpcpar.comm.control import Alone
from hpcpar.config.load import job_from_tables
from hpcpar.config.resolve import resolve
from hpcpar.layout.layout import Layout
from hpcpar.units import format_bytes, format_seconds

KINDS = dict.fromkeys(("weight", "exp_avg", "exp_avg_sq"), "float32")


class Stall(NamedTuple):
    """Seconds of one round."""

    memory_copy_s: float
    stall_s: float
    published_s: float  # from the start of the copy
    synchronous_s: float  # the same set, saved by the process itself


def layout_of(num_bytes: float) -> Layout:
    """Return the layout of one rank whose state is about this large: GPT layers of 12 hidden^2 parameters."""
    hidden, layers = 768, max(1, round(num_bytes / 12 / (12 * 768**2)))
    tables = {"model": {"layers": layers, "hidden": hidden, "heads": 12, "seq": 8, "vocab": 256},
              "train": {"precision": "fp32", "global_batch": 1}}
    return Layout(resolve(job_from_tables(tables), 1))


def measure(folder: Path, num_bytes: float, rounds: int) -> tuple[int, list[Stall]]:
    """Return the bytes of a set, and each round's seconds."""
    layout = layout_of(num_bytes)
    saver = BackgroundSaver(Saving(folder / "beside", layout, keep=1), Alone(), KINDS)
    live = {kind: [np.full_like(flat, 1.5) for flat in flats] for kind, flats in saver.shards.items()}
    itself = Tasks(Saving(folder / "itself", layout, keep=1), 0, live)
    plain = {kind: [np.zeros_like(flat) for flat in flats] for kind, flats in live.items()}
    found = []
    for step in range(rounds + 1):
        copied_s = _copy(live, plain)
        start = time.perf_counter()
        _copy(live, saver.shards)
        saver.start(step, {})
        stall_s = time.perf_counter() - start
        saver.finish()
        published_s = time.perf_counter() - start
        start = time.perf_counter()
        size = save_now(itself, step, Alone(), {}).num_bytes
        found.append(Stall(copied_s, stall_s, published_s, time.perf_counter() - start))
    saver.close()
    return size, found[1:]  # the first one warms up


def _copy(source: dict[str, list[np.ndarray]], target: dict[str, list[np.ndarray]]) -> float:
    start = time.perf_counter()
    for kind, flats in source.items():
        for one, other in zip(flats, target[kind], strict=True):
            other[:] = one
    return time.perf_counter() - start


def main() -> None:
    """Measure, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="state of the rank (1)")
    parser.add_argument("--rounds", type=int, default=5, help="medians are taken over these (5)")
    parser.add_argument("--folder", type=Path, help="where to write (a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        size, found = measure(Path(folder), args.gib * 2**30, args.rounds)
    median = Stall(*(statistics.median(values) for values in zip(*found, strict=True)))
    ratios = [one.stall_s / one.memory_copy_s for one in found]
    print(f"set of {format_bytes(size)}, medians of {args.rounds} (least to most)")
    for name, values in zip(Stall._fields, zip(*found, strict=True), strict=True):
        print(f"  {name:<14} {format_seconds(getattr(median, name)):>8}  ({min(values):.3f}-{max(values):.3f} s)")
    print(f"  stall / memory copy {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}), "
          f"stall / synchronous save {median.stall_s / median.synchronous_s:.2f}")


if __name__ == "__main__":
    main()
