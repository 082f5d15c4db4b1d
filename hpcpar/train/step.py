"""ONE training step, the same on every layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from hpcpar.comm.groups import Groups
from hpcpar.config.ramp import batch_size
from hpcpar.layout.layout import Layout
from hpcpar.nn.dropout import draw_for
from hpcpar.optim.schedules import learning_rate
from hpcpar.parallel.pipeline import Microbatch, Pipeline, Played
from hpcpar.parallel.zero import ShardedOptimizer
from hpcpar.train.stability import distrust, remember
from hpcpar.train.state import Progress

Tokens = Callable[[np.ndarray], np.ndarray]  # sample numbers [n] -> tokens [n, seq + 1] int64


@dataclass(frozen=True)
class Trainee:
    """All that a step works on."""

    layout: Layout
    groups: Groups
    pipeline: Pipeline
    optimizer: ShardedOptimizer
    device: torch.device


@dataclass(frozen=True)
class StepResult:
    """What a step did; equal on all ranks but for `played`."""

    loss: float
    grad_norm: float
    lr: float
    samples: range
    skipped: str  # why the update was left out, or empty
    stop: bool
    num_writing: int  # ranks whose checkpoint writer was at work when the step began
    played: Played


def train_step(trainee: Trainee, progress: Progress, tokens: Tokens, stop: bool = False,
               writing: bool = False) -> StepResult:
    """Take one optimizer step and advance `progress`; every rank must call.

    `stop` is this rank's wish to stop, `writing` says that its checkpoint writer is at work: what the ranks say comes
    back to all of them, in the same small all-reduce that carries loss and gradient norm. A bad step
    (`stability`) leaves weights and moments untouched on all ranks alike.
    """
    job = trainee.layout.job
    batch = batch_size(job, progress.samples)
    samples = range(progress.samples, progress.samples + batch)
    factor, at = job.train.microbatch / batch, trainee.groups.at
    played = compute_gradients(trainee, progress, tokens, samples, factor * progress.loss_scale)

    mine = torch.zeros(4, dtype=torch.float64, device=trainee.device)
    mine[0] = trainee.optimizer.norm_squared()
    if played.losses and at.tp_rank == 0:
        mine[1] = torch.stack(played.losses).sum() * factor
    mine[2], mine[3] = float(stop), float(writing)
    if trainee.groups.everyone is not None:
        dist.all_reduce(mine, group=trainee.groups.everyone)
    norm_squared, loss, stops, num_writing = mine.tolist()
    grad_norm = math.sqrt(norm_squared) / progress.loss_scale if norm_squared >= 0 else math.nan
    lr = learning_rate(job.optim, progress.step)

    skipped = distrust(job.stability, progress, loss, grad_norm)
    if skipped:
        progress.skipped(finite=math.isfinite(grad_norm) and math.isfinite(loss))
    else:
        trainee.pipeline.note("update")
        clip = min(1.0, job.optim.clip / (grad_norm + 1e-6)) if job.optim.clip else 1.0
        trainee.optimizer.update(lr, progress.updates, clip / progress.loss_scale)
        progress.updated(scaled=job.train.precision == "fp16")
        remember(job.stability, progress, loss, grad_norm)
    progress.step += 1
    progress.samples += batch
    return StepResult(loss, grad_norm, lr, samples, skipped, stops > 0, int(num_writing), played)


def compute_gradients(trainee: Trainee, progress: Progress, tokens: Tokens, samples: range,
                      loss_factor: float) -> Played:
    """Play the pipeline on a batch, given by its places in the run, and sum its gradients over who shares them."""
    layout, size = trainee.layout, trainee.layout.job.train.microbatch
    num_microbatches = len(samples) // (layout.mesh.dp_size * size)
    trainee.optimizer.begin(num_microbatches)
    played = trainee.pipeline.play(layout.program(trainee.groups.at.pp_rank, num_microbatches),
                                   lambda m: read_microbatch(trainee, tokens, samples, m, progress), size, loss_factor)
    trainee.pipeline.note("reduce")
    trainee.optimizer.finish_reduction()
    return played


def read_microbatch(trainee: Trainee, tokens: Tokens, samples: range, m: int, progress: Progress) -> Microbatch:
    """Read this replica's microbatch m of a batch, given by its places in the run."""
    job, at = trainee.layout.job, trainee.groups.at
    numbers = _numbers(trainee, samples.start, m, progress)
    if reads_text(trainee):
        rows = torch.from_numpy(tokens(numbers)).to(trainee.device, non_blocking=True)
    else:
        rows = torch.empty(len(numbers), 0, dtype=torch.int64)
    draw = None
    if job.model.dropout > 0:
        own = job.model.seq // trainee.layout.mesh.tp_size if trainee.layout.sequence_parallel else job.model.seq
        start = at.tp_rank * own if trainee.layout.sequence_parallel else 0
        ids = torch.from_numpy(numbers).to(trainee.device)
        draw = draw_for(ids, range(start, start + own), job.model.seq, job.train.seed, progress.step)
    return Microbatch(rows[:, :-1], rows[:, 1:], draw)


def next_numbers(trainee: Trainee, progress: Progress) -> list[np.ndarray]:
    """Foretell the sample numbers of each microbatch that this rank reads in the step after the coming one."""
    layout, start = trainee.layout, progress.samples + batch_size(trainee.layout.job, progress.samples)
    if progress.step + 1 >= layout.job.train.steps or not reads_text(trainee):
        return []
    num_microbatches = batch_size(layout.job, start) // (layout.mesh.dp_size * layout.job.train.microbatch)
    return [_numbers(trainee, start, m, progress) for m in range(num_microbatches)]


def reads_text(trainee: Trainee) -> bool:
    """Say whether this rank needs tokens or targets: a stage between the pipeline's ends needs neither."""
    return any(network.first or network.last for network in trainee.pipeline.chunks.values())


def _numbers(trainee: Trainee, start: int, m: int, progress: Progress) -> np.ndarray:
    """Return the sample numbers of this replica's microbatch m in a batch that begins at place `start` of the run."""
    size = trainee.layout.job.train.microbatch
    first = start + (m * trainee.layout.mesh.dp_size + trainee.groups.at.dp_rank) * size
    return progress.sample_numbers(np.arange(first, first + size))
