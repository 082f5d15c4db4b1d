"""A signal to one rank at a random moment of a run: one valid checkpoint, a clean stop, and the next step is right.

    mpirun -n 4 python -m tests.chaos.signals 200      (make signals; a sample is in the suite)
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

from hpcpar.checkpoint.verify import published_sets, verify_set
from hpcpar.comm.bootstrap import World, connect, open_process_group
from hpcpar.config.job import Job
from hpcpar.config.load import override
from hpcpar.config.resolve import resolve
from hpcpar.config.run_folder import RunFolder, read_lines
from hpcpar.config.surroundings import Surroundings
from hpcpar.train.loop import start_run, train
from hpcpar.train.preflight import open_order
from tests.train.small import make_job, make_store

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def campaign(world: World, place: Path, seeds: range) -> Counter[str]:
    """Interrupt one run a seed and let it go on; return how often what was seen. Every rank must call."""
    job = resolve(make_job(place / "store", layout={"tp": 2, "pp": 2}, train={"steps": 12}), world.size)
    train_once(world, job, RunFolder(place / "whole"))
    whole = curve(place / "whole")
    length_s = sum(line.get("step_s", 0.0) for line in read_lines(place / "whole/metrics.jsonl"))
    seen: Counter[str] = Counter()
    for seed in seeds:
        rng = np.random.default_rng(seed)
        rank, number = int(rng.integers(world.size)), SIGNALS[int(rng.integers(len(SIGNALS)))]
        delay_s = world.control.broadcast(rng.uniform(0, length_s))
        folder = RunFolder(place / f"seed-{seed}")
        one = override(job, checkpoint={"asynchronous": bool(seed % 2)})
        done = train_once(world, one, folder, (number, delay_s) if world.rank == rank else None)
        if world.rank == 0:
            sets = published_sets(folder.checkpoints)
            assert len(sets) == 1 and verify_set(sets[0]), (seed, sets)
            stopped = len(curve(folder.path))
            assert sets[0].name == f"step-{stopped:08d}" and done == (stopped == len(whole)), seed
            seen[f"{number.name} at step {stopped}" if not done else "the run had ended before"] += 1
        world.control.barrier()
        assert train_once(world, one, folder), seed
        if world.rank == 0:
            assert curve(folder.path) == whole, seed
    return seen


def train_once(world: World, job: Job, folder: RunFolder, hit: tuple[signal.Signals, float] | None = None) -> bool:
    """Play `hpcpar train` in this world, signalled after some seconds of training; return whether the job is done."""
    folder.create()
    world.control.barrier()
    run = start_run(job, world, folder, open_order(job), False, lambda action: None)
    timer = threading.Timer(hit[1], os.kill, (os.getpid(), hit[0])) if hit else None

    def note(**_where: object) -> None:
        if timer and not timer.is_alive() and not timer.finished.is_set():
            timer.start()  # with the first step: now the loop has its own signal handlers

    try:
        return train(run, note)
    finally:
        if timer:
            timer.cancel()
        run.trainee.groups.close()


def curve(run: Path) -> dict[int, tuple[float, str]]:
    """Return loss and samples of every step; in fp64 and at one layout they are equal to the last bit."""
    return {line["step"]: (line["loss"], line["samples_hash"])
            for line in read_lines(run / "metrics.jsonl") if "loss" in line}


def main(count: int) -> None:
    """Run the campaign and print what was seen."""
    world = connect(Surroundings.read(os.environ))
    open_process_group(world)
    with tempfile.TemporaryDirectory() as own:
        place = Path(world.control.broadcast(own))
        if world.rank == 0:
            make_store(place)
        world.control.barrier()
        start = time.monotonic()
        seen = campaign(world, place, range(count))
        world.control.barrier()
        if world.rank == 0:
            steps = Counter(key.rpartition(" ")[2] for key in seen.elements() if "step" in key)
            names = Counter(key.partition(" ")[0] for key in seen.elements() if "step" in key)
            print(f"\n{count} seeds on {world.size} ranks in {time.monotonic() - start:.0f} s: {sum(names.values())} "
                  f"stopped cleanly with one valid set and went on to the last bit ({dict(names)}; at {len(steps)} "
                  f"different steps), {count - sum(names.values())} had ended before the signal")


if __name__ == "__main__":
    main(int(sys.argv[1]))
