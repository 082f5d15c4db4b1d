"""The training loop: steps, metrics, validations, checkpoints, and a clean stop."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch
import torch.distributed as dist

from hpcpar.checkpoint.format import read_manifest
from hpcpar.checkpoint.load import load_together
from hpcpar.checkpoint.memory import Memory, disown, open_memory, recall
from hpcpar.checkpoint.verify import latest_set, read_state
from hpcpar.comm.bootstrap import World
from hpcpar.comm.control import Control
from hpcpar.comm.crowd import Place, crowded_ranks, place
from hpcpar.comm.groups import open_groups
from hpcpar.config.job import Job
from hpcpar.config.load import to_toml
from hpcpar.config.run_folder import RunFolder
from hpcpar.config.surroundings import process_table
from hpcpar.data.ahead import ReadAhead
from hpcpar.data.sampler import SampleOrder
from hpcpar.errors import RunError, UserError
from hpcpar.layout.layout import Layout
from hpcpar.parallel.build import build, initialise
from hpcpar.parallel.pipeline import Microbatch
from hpcpar.parallel.replicas import find_drift
from hpcpar.parallel.zero import ShardedOptimizer
from hpcpar.train.foretold import Foretold, foretell
from hpcpar.train.metrics import Metrics, peak_memory
from hpcpar.train.resume import check_same, or_offer, saved_progress
from hpcpar.train.rewind import leave_out
from hpcpar.train.saving import Saves
from hpcpar.train.state import FIRST_LOSS_SCALE, Progress
from hpcpar.train.step import StepResult, Trainee, next_numbers, train_step
from hpcpar.train.straggler import REPORT_EVERY, Stragglers
from hpcpar.train.waits import TEXT, Waits, mean_of

MAX_BAD_STEPS = 20  # in a row, or rollbacks in all: after that something is wrong that no batch explains
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    """Set by a signal; the loop looks at it between steps. A handler that did more could not be trusted mid-step."""

    def __init__(self) -> None:
        self.name = ""
        for number in SIGNALS:
            signal.signal(number, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name


@dataclass
class Run:
    """A run on this rank: what the loop works with."""

    job: Job
    world: World
    folder: RunFolder
    order: SampleOrder
    trainee: Trainee
    progress: Progress
    metrics: Metrics | None  # on rank 0
    saves: Saves
    places: list[Place]  # of all ranks
    memory_before: int = 0  # bytes that the process had held before the run's first tensor
    foretold: Foretold | None = None  # on rank 0, where the planner knows the machine
    waits: Callable[[], dict[str, float]] = dict  # group -> seconds that this rank has waited in its calls so far

    def say(self, text: str) -> None:
        """Print a line, once for all ranks."""
        logging.info(text)
        if self.metrics is not None:
            self.metrics.say(text)


def start_run(job: Job, world: World, folder: RunFolder, order: SampleOrder, live: bool,
              note: Callable[[str], None]) -> Run:
    """Build this rank's part and fill it from the newest published set, or with first weights.

    Raises UserError where the set belongs to another model or other data.
    """
    layout, memory_before = Layout(job), peak_memory(world.device)
    said: list[str] = []
    anew = "no set to go on from: begun anew" if folder.journal.exists() else "new run"
    on_disk, found, memory = _find(layout, world, folder, said)
    state = read_state(found) if found else None
    if found and state is not None:
        check_same(state, job, order, found)
    groups = open_groups(layout.mesh, world.rank)
    places = world.control.all_gather(place(world.host))
    pipeline, optimizer = build(layout, groups, world.device, note)
    progress = Progress(loss_scale=FIRST_LOSS_SCALE if job.train.precision == "fp16" else 1.0)
    if found is None or state is None:
        initialise(optimizer, job.train.seed)
    else:
        progress = saved_progress(state, job, progress)
        fill(optimizer, found, world.control)
    leave_out(folder, progress)
    metrics = None
    if world.rank == 0:
        folder.stop.unlink(missing_ok=True)  # now, not when it was obeyed: a requeue asks whether it is there
        folder.config.write_text(to_toml(job))
        metrics = Metrics(folder, job, progress, world.device, live)
        metrics.journal("start", step=progress.step, set=found.name if found else "", ranks=world.size, host=world.host,
                        pid=os.getpid(), table=process_table())
    trainee = Trainee(layout, groups, pipeline, optimizer, world.device)
    saved_step = progress.step if found and found == on_disk else -1
    saves = Saves(trainee, world, folder.checkpoints, order.fingerprint, saved_step, metrics, memory)
    run = Run(job, world, folder, order, trainee, progress, metrics, saves, places, memory_before)
    for text in said:
        run.say(text)
    whence = f"resumed {found.name}{' from memory' if found != on_disk else ''}" if found else anew
    run.say(f"{whence} in {folder.path}: tp {layout.mesh.tp_size} x pp "
            f"{layout.mesh.pp_size} x dp {layout.mesh.dp_size} on {world.device.type}")
    _foretell(run)
    return run


def _find(layout: Layout, world: World, folder: RunFolder,
          said: list[str]) -> tuple[Path | None, Path | None, Memory | None]:
    """Return the newest set on disk, the newest of all, and where copies are kept in memory if that is wished.

    If it is not, copies of earlier starts go. `said` takes what the user should know. Every rank must call.
    """
    on_disk = world.control.broadcast(latest_set(folder.checkpoints) if world.rank == 0 else None)
    if layout.job.checkpoint.asynchronous != "neighbour":
        disown(folder.checkpoints)
        return on_disk, on_disk, None
    memory = open_memory(folder.checkpoints, world.control, world.host)
    if on_disk is None:
        return None, None, memory
    found = recall(memory, layout, world.control, read_manifest(on_disk).step, said.append)
    return on_disk, found or on_disk, memory


def _foretell(run: Run) -> None:
    """Have rank 0 say what the planner expects of this job. Every rank must call."""
    hosts = run.world.control.all_gather(run.world.host)
    if run.metrics is None:
        return
    try:
        run.foretold = foretell(run.job, hosts.count(run.world.host))
        run.say(str(run.foretold))
    except UserError as error:  # of the planner's table of machines, which training does not need
        run.say(f"not foretold: {error}")


def fill(optimizer: ShardedOptimizer, found: Path, control: Control) -> None:
    """Fill a rank's weights and moments from a set, which is verified on the way; every rank must call."""
    layout = optimizer.layout
    main = {"fp64": np.float64}.get(layout.job.train.precision, np.float32)
    stored = or_offer(found, control, lambda: load_together(found, layout, control, main))
    for kind, shards in optimizer.shards().items():
        for shard, values in zip(shards, stored[kind], strict=True):
            shard.copy_(torch.from_numpy(values))
    optimizer.publish_weights()


class Pace:
    """Gathers every few steps how long each rank worked and waited; rank 0 notes it, and names who is slow."""

    def __init__(self, run: Run):
        self._run, self._step_s, self._own_s, self._num_steps = run, 0.0, 0.0, 0
        self._waits: dict[str, float] = {}
        self._stragglers = Stragglers(run.trainee.layout.mesh, crowded_ranks(run.places))

    def step(self, step_s: float, waits: Mapping[str, float]) -> None:
        """Note a step's seconds, and those in which it waited; every rank must call.

        Waiting for text is a rank's own: its disk is slow.
        """
        self._step_s += step_s / REPORT_EVERY
        self._own_s += step_s - sum(seconds for axis, seconds in waits.items() if axis != TEXT)
        for axis, seconds in waits.items():
            self._waits[axis] = self._waits.get(axis, 0.0) + seconds / REPORT_EVERY
        self._num_steps += 1
        if self._num_steps % REPORT_EVERY:
            return
        everyones = self._run.world.control.all_gather((self._own_s, self._waits))
        mean_step_s, self._step_s, self._own_s, self._waits = self._step_s, 0.0, 0.0, {}
        if self._run.metrics is None:
            return
        mean = {axis: round(seconds, 6) for axis, seconds in mean_of([waits for _, waits in everyones]).items()}
        self._run.metrics.event(self._run.progress.step, mean_step_s=round(mean_step_s, 6), mean_waits_s=mean)
        for rank, ratio in self._stragglers.add([own_s for own_s, _ in everyones]):
            host, _ = self._run.places[rank]
            self._run.say(f"SLOW: rank {rank} on {host} takes {ratio:.2f} times as long as its peers for its own work; "
                          f"if that stays so, leave the host out: --exclude={host} (sbatch, srun)")
            self._run.metrics.event(self._run.progress.step, slow_rank=rank, host=host, ratio=round(ratio, 3))


def train(run: Run, note: Callable[..., None]) -> bool:
    """Take steps until the job is done or someone asks to stop; return whether it is done. Every rank must call.

    `note(step=..., phase=...)` keeps where this rank is, for whoever asks after its death.
    """
    flag, job, pace = StopFlag(), run.job, Pace(run)
    stopped, result = False, None
    text = ReadAhead(run.order.tokens)
    waits = Waits(run.waits, lambda: text.waited_s)
    while run.progress.step < job.train.steps and not stopped:
        progress = run.progress
        start = time.perf_counter()
        note(step=progress.step + 1, phase="first step" if result is None else "step")
        wish = bool(flag.name) or (run.world.rank == 0 and run.folder.stop.exists())
        waits.since()  # what lay between two steps
        text.expect(next_numbers(run.trainee, progress))
        result = train_step(run.trainee, progress, text, wish, run.saves.writing)
        stopped = result.stop
        step_s, waited = time.perf_counter() - start, waits.since()
        if run.metrics is not None:
            numbers = progress.sample_numbers(np.arange(result.samples.start, result.samples.stop))
            run.metrics.step(progress, result, step_s, waited, int(numbers[0]), run.order.samples_hash(numbers))
        pace.step(step_s, waited)
        if result.skipped:
            _after_bad_step(run, result)
            progress = run.progress
        if job.stability.check_replicas_every and progress.step % job.stability.check_replicas_every == 0:
            note(action="check replicas")
            _check_replicas(run)
        if job.data.validate_every and progress.step % job.data.validate_every == 0:
            note(phase="validate")
            validate(run)
        run.saves.after_step(step_s, result.num_writing)
        if run.saves.due(progress.step):
            note(phase="save")
            run.saves.save(progress)
    text.close()
    note(phase="finish")
    progress = run.progress
    done = progress.step >= job.train.steps
    if done and result is not None and not (job.data.validate_every and progress.step % job.data.validate_every == 0):
        validate(run)
    run.saves.last(progress)
    if result is not None:
        _write_timeline(run, result)
    _finish(run, done)
    return done


def _check_replicas(run: Run) -> None:
    """End the run, on all ranks alike, where copies of a weight are no longer equal: nothing of it is to be saved."""
    drift = sorted({text for text in run.world.control.all_gather(find_drift(run.trainee.optimizer)) if text})
    if drift:
        raise RunError(f"replicas have drifted apart: {'; '.join(drift)}; go back to an older set with "
                       "hpcpar train --rewind-to STEP, and have that rank's host tested")


def _after_bad_step(run: Run, result: StepResult) -> None:
    """Say it, go back to the last set if that is wished, or end a run that has had too many. All ranks do alike."""
    job, progress = run.job, run.progress
    run.say(f"step {progress.step}: update left out, {result.skipped} (loss {result.loss:g}, gradient norm "
            f"{result.grad_norm:g})")
    if max(progress.skips, progress.rollbacks) > MAX_BAD_STEPS:
        raise RunError(f"{result.skipped}: {progress.skips} bad steps in a row, {progress.rollbacks} rollbacks (loss "
                       f"{result.loss}, gradient norm {result.grad_norm}); lower optim.lr")
    overflow = job.train.precision == "fp16" and not math.isfinite(result.grad_norm)  # that the loss scale mends
    if job.stability.on_spike == "rollback" and not overflow:
        _roll_back(run, result)


def _roll_back(run: Run, result: StepResult) -> None:
    """Return to the last set of this run, and leave the bad step's samples out from now on. Every rank must call."""
    bad, at = run.progress, run.progress.step
    run.saves.finish()
    found = run.world.control.broadcast(latest_set(run.folder.checkpoints) if run.world.rank == 0 else None)
    if found is None:
        return  # nothing was saved yet: leaving the update out has to do
    fill(run.trainee.optimizer, found, run.world.control)
    numbers = bad.sample_numbers(np.array([result.samples.start, result.samples.stop - 1]))
    run.progress = Progress(**read_state(found)["progress"])
    run.progress.left_out, run.progress.rollbacks = bad.left_out, bad.rollbacks + 1
    run.progress.leave_out(int(numbers[0]), int(numbers[1]) + 1)
    run.say(f"step {at}: rolled back to {found.name}; samples {numbers[0]} to {numbers[1]} are left out from now on")
    if run.metrics is not None:
        run.metrics.event(at, rolled_back_to=run.progress.step, left_out=run.progress.left_out)


def validate(run: Run) -> None:
    """Measure the loss on held-out samples, the same ones on every layout. Every rank must call."""
    order, layout, at = run.order, run.trainee.layout, run.trainee.groups.at
    num = min(run.job.data.validate_samples, order.num_validation)
    if num == 0:
        return
    dp_size = layout.mesh.dp_size
    # one sequence a microbatch, so that any number of samples is shared out; a replica without a sample left
    # computes one more, which does not count
    numbers = np.arange(-(-num // dp_size)) * dp_size + at.dp_rank

    def microbatch(m: int) -> Microbatch:
        rows = torch.from_numpy(order.validation_tokens(numbers[m:m + 1] % num)).to(run.world.device)
        return Microbatch(rows[:, :-1], rows[:, 1:])

    played = run.trainee.pipeline.play(layout.forward_program(at.pp_rank, len(numbers)), microbatch, 1, 1.0)
    total = torch.zeros(1, dtype=torch.float64, device=run.world.device)
    if played.losses and at.tp_rank == 0:
        total += torch.stack(played.losses)[torch.from_numpy(numbers < num).to(run.world.device)].sum()
    if run.trainee.groups.everyone is not None:
        dist.all_reduce(total, group=run.trainee.groups.everyone)
    if run.metrics is not None:
        run.metrics.validation(run.progress.step, total.item() / num)


def _write_timeline(run: Run, result: StepResult) -> None:
    """Keep what every rank did when in the last step; rank 0 writes it."""
    offset = time.time() - time.perf_counter()
    mine = [(name, start + offset, end + offset) for name, start, end in result.played.events]
    everyones = run.world.control.all_gather(mine)
    if run.world.rank == 0:
        places = [run.trainee.layout.mesh.coordinates(rank)._asdict() for rank in range(run.world.size)]
        rows = [{**place, "events": events} for place, events in zip(places, everyones, strict=True)]
        with suppress(OSError):  # a full disk; the run itself is done and saved
            run.folder.timeline.write_text(json.dumps({"step": run.progress.step, "ranks": rows}))


def _finish(run: Run, done: bool) -> None:
    """Say how it ended and what comes next."""
    memory = run.world.control.all_gather(peak_memory(run.world.device) - run.memory_before)
    path = shlex.quote(str(run.folder.path))
    if run.metrics is not None and run.foretold is not None and run.metrics.recent_s:
        run.say(run.foretold.beside(run.metrics.recent_s, memory))
    run.say(f"done: {run.progress.step} steps; next: hpcpar generate {path}, or hpcpar show {path} --plot" if done else
            f"stopped cleanly at step {run.progress.step}; the same command goes on from there")
    if run.metrics is not None:
        try:
            run.metrics.journal("done" if done else "stopped", step=run.progress.step)
        except OSError as error:  # a full disk, but the sets are where they should be
            run.say(f"{run.folder.journal}: {error.strerror}; it does not say how this start ended")
        run.metrics.close()
