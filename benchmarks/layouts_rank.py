"""hpcpar's rank in benchmarks/layouts.py: the job, its first weights for the peers, and where a rank's time goes."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from peers.work import (
    BETAS,
    CLIP,
    HEADS,
    HIDDEN,
    LAYERS,
    LEARNING_RATE,
    SEQ,
    VOCAB,
    WARM_UP,
    WEIGHT_DECAY,
    peak_memory,
    rows,
    timed,
)

from hpcpar.config.job import Job
from hpcpar.config.load import override
from hpcpar.config.resolve import resolve

Sizes = tuple[int, int, int]  # tp, pp, dp


def hpcpar_rank(sizes: Sizes, args: argparse.Namespace, profile: bool) -> None:
    """Train as one rank; rank 0 prints the seconds a step and the losses, with `profile` every rank's times too."""
    from hpcpar.comm.bootstrap import connect, open_process_group
    from hpcpar.comm.crowd import let_later_stages_first, place
    from hpcpar.comm.groups import open_groups
    from hpcpar.comm.silent_backend import silent_world
    from hpcpar.config.surroundings import Surroundings
    from hpcpar.layout.layout import Layout
    from hpcpar.parallel.build import build, initialise
    from hpcpar.train.state import Progress
    from hpcpar.train.step import Trainee, train_step

    world = connect(Surroundings.read(os.environ))
    communication = ExitStack()
    if args.silent:
        communication.enter_context(silent_world(world.size, world.rank))
    else:
        open_process_group(world)
    layout = Layout(hpcpars_job(sizes, args))
    watch = Stopwatch()
    groups = open_groups(layout.mesh, world.rank)
    places = world.control.all_gather(place(world.host))
    let_later_stages_first(places, world.rank, layout.chunk_ranks, groups.at.pp_rank)
    pipeline, optimizer = build(layout, groups, world.device, watch.note if profile else lambda action: None)
    initialise(optimizer, layout.job.train.seed)
    trainee, progress = Trainee(layout, groups, pipeline, optimizer, world.device), Progress()
    if profile and world.size > 1:
        watch.see_waits()

    def step(number: int) -> float:
        watch.note("begin")
        result = train_step(trainee, progress, lambda numbers: rows(int(numbers[0]), len(numbers)).numpy())
        watch.note("between")
        return result.loss

    def barrier() -> None:
        world.control.all_gather(None)
        watch.clear_once()

    seconds, losses = timed(step, barrier, args.steps)
    result: dict[str, object] = {"seconds_per_step": seconds, "losses": losses}
    if profile:
        mine = {phase: (wall / args.steps, cpu / args.steps) for phase, (wall, cpu) in watch.totals.items()}
        result["ranks"] = world.control.all_gather((str(groups.at), mine))
    result["memory"] = world.control.all_gather(peak_memory(lambda: step(WARM_UP + args.steps)))
    if world.rank == 0:
        print(json.dumps(result), flush=True)
    groups.close()
    communication.close()


def hpcpars_job(sizes: Sizes, args: argparse.Namespace) -> Job:
    """Return the resolved job that hpcpar trains on a layout."""
    tp, pp, dp = sizes
    model = {"kind": "gpt", "layers": LAYERS, "hidden": HIDDEN, "heads": HEADS, "seq": SEQ, "vocab": VOCAB}
    train = {"global_batch": args.batch, "microbatch": args.microbatch if pp > 1 else args.batch // dp,
             "precision": "fp32"}
    optim = {"lr": LEARNING_RATE, "min_lr": LEARNING_RATE, "betas": BETAS, "weight_decay": WEIGHT_DECAY, "clip": CLIP}
    options = {"tp": tp, "pp": pp, "dp": dp, **json.loads(args.options)}
    job = override(Job(), model={**model, **json.loads(args.model)}, train=train, optim=optim, layout=options)
    return resolve(job, tp * pp * dp)


def save_first_weights(job: Job, path: Path) -> None:
    """Write hpcpar's first weights by name, for the peers to start from."""
    from hpcpar.layout.parameters import parameter_table
    from hpcpar.nn.init import initial_values

    table = parameter_table(job.model)
    torch.save({p.name: initial_values(p, p.box(1, 0), job.train.seed).float() for p in table}, path)


class Stopwatch:
    """Splits a rank's time without a gap: wall and CPU seconds by phase, waits for other ranks apart."""

    def __init__(self) -> None:
        self.totals: dict[str, tuple[float, float]] = {}
        self.phase, self.since, self.clear = "between", (time.perf_counter(), time.process_time()), True

    def switch(self, phase: str) -> str:
        """Start a phase; returns the one that ends."""
        now, before = (time.perf_counter(), time.process_time()), self.phase
        wall, cpu = self.totals.get(before, (0.0, 0.0))
        self.totals[before] = (wall + now[0] - self.since[0], cpu + now[1] - self.since[1])
        self.phase, self.since = phase, now
        return before

    def note(self, action: str) -> None:
        self.switch(action.strip("0123456789"))

    def clear_once(self) -> None:
        """Forget the warm-up: called at the barrier before the timed steps, and again, without effect, after them."""
        self.switch(self.phase)
        if self.clear:
            self.totals, self.clear = {}, False

    def see_waits(self) -> None:
        from hpcpar.comm.mpi_backend import MPIWork

        wait = MPIWork.wait

        def watched(work: MPIWork, timeout: datetime.timedelta = datetime.timedelta(0)) -> bool:
            before = self.switch(f"{self.phase} wait")
            try:
                return wait(work, timeout)
            finally:
                self.switch(before)

        MPIWork.wait = watched  # type: ignore[method-assign]
