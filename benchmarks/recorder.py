"""What the flight recorder costs: mpirun -n 8 python benchmarks/recorder.py

Calls and notes of a step, counted in real steps, times what one costs in a microbenchmark, over the step's time. (The
difference of two whole runs would drown in the noise of oversubscribed cores.)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median

import numpy as np

from hpcpar.comm.bootstrap import connect, open_process_group
from hpcpar.comm.groups import open_groups
from hpcpar.comm.recorder import Recorder
from hpcpar.config.job import Job
from hpcpar.config.load import override
from hpcpar.config.resolve import resolve
from hpcpar.config.surroundings import Surroundings
from hpcpar.layout.layout import Layout
from hpcpar.parallel.build import build, initialise
from hpcpar.train.state import Progress
from hpcpar.train.step import Trainee, train_step

STEPS = 8
SIZES = {"small": {"layers": 4, "hidden": 64, "heads": 4, "seq": 64, "vocab": 512},
         "10M": {"layers": 8, "hidden": 256, "heads": 8, "seq": 256, "vocab": 8192}}


def seconds_each(deed: Callable[[int], None], num: int = 20000) -> float:
    """Return the least seconds a deed takes, over five rounds."""
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for number in range(num):
            deed(number)
        rounds.append((time.perf_counter() - start) / num)
    return min(rounds)


def microbenchmark() -> tuple[float, float]:
    """Return the seconds of a call (begin, wait, end, from ten frames down) and of a note."""
    recorder = Recorder()
    group = recorder.group("tp", (0, 1))

    def call(number: int) -> None:
        made = recorder.begin(group, "all_reduce", 4096)
        recorder.wait(made)
        recorder.end(made)

    def from_below(depth: int, number: int) -> None:
        if depth:
            from_below(depth - 1, number)
        else:
            call(number)

    frames = seconds_each(lambda number: from_below(10, number)) - seconds_each(lambda number: from_below_nothing(10))
    return frames, seconds_each(lambda number: recorder.note(action="F0" if number % 2 else "B0"))


def from_below_nothing(depth: int) -> None:
    """Cost what `from_below` costs without the call."""
    if depth:
        from_below_nothing(depth - 1)


def main() -> None:
    """Print a row a model size."""
    world = connect(Surroundings.read(os.environ))
    recorder = world.control.recorder = Recorder()
    open_process_group(world)
    call_s, note_s = max(world.control.all_gather(microbenchmark()))
    if world.rank == 0:
        print(f"a call {call_s * 1e6:.2f} us, a note {note_s * 1e6:.2f} us (slowest of {world.size} ranks at once)")
        print("| model | calls a step | notes | step | recorder | share |\n|---|---|---|---|---|---|")
    for name, model in SIZES.items():
        wish = {"tp": 2, "pp": 2, "dp": world.size // 4} if world.size >= 4 else {"dp": world.size}
        job = resolve(override(Job(), model=model, layout=wish, train={"global_batch": 16, "precision": "fp32"}),
                      world.size)
        layout, notes = Layout(job), [0]
        groups = open_groups(layout.mesh, world.rank)

        def note(action: str, notes: list[int] = notes) -> None:
            notes[0] += 1
            recorder.note(action=action)

        pipeline, optimizer = build(layout, groups, world.device, note)
        initialise(optimizer, 1)
        trainee, progress, times = Trainee(layout, groups, pipeline, optimizer, world.device), Progress(), []
        rng = np.random.default_rng(world.rank)
        tokens = rng.integers(0, model["vocab"], (1, model["seq"] + 1))
        begun = recorder._begun
        for _ in range(STEPS):
            start = time.perf_counter()
            train_step(trainee, progress, lambda numbers, tokens=tokens: np.repeat(tokens, len(numbers), 0))
            times.append(time.perf_counter() - start)
        calls, num_notes = (recorder._begun - begun) / STEPS, notes[0] / STEPS
        mine = (calls * call_s + num_notes * note_s, calls, num_notes)
        worst = max(world.control.all_gather(mine))
        if world.rank == 0:
            step_s = median(times[2:])
            print(f"| {name} | {worst[1]:.0f} | {worst[2]:.0f} | {step_s * 1e3:.0f} ms | {worst[0] * 1e3:.2f} ms | "
                  f"{worst[0] / step_s:.2%} |")
        groups.close()
    world.control.barrier()


if __name__ == "__main__":
    main()
