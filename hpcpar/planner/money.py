"""Days, GPU-hours, goodput, money and energy of a whole run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hpcpar.config.job import Job
from hpcpar.planner.flops import DAY

RESTART_S = 900.0  # from a failure to the first new step: detection, requeue, start, load
COPY_BYTES_PER_S = 10e9  # of a device to its host: what the step loop waits for when it saves


@dataclass(frozen=True)
class Goodput:
    """How much of the time makes progress that lasts."""

    share: float
    interval_s: float  # between checkpoints
    best_interval_s: float
    mtbf_s: float
    stall_s: float  # of one save


@dataclass(frozen=True)
class Run:
    """The whole run."""

    tokens: float
    days: float  # at goodput 100%
    days_with_failures: float
    gpu_hours: float
    money: float
    energy_mwh: float
    goodput: Goodput


def best_checkpoint_interval(save_s: float, mtbf_s: float) -> float:
    """Return sqrt(2 x save x mtbf). Source: Young 1974; Daly 2006, doi 10.1016/j.future.2004.11.016."""
    return math.sqrt(2 * save_s * mtbf_s)


def goodput(stall_s: float, interval_s: float, mtbf_s: float, restart_s: float) -> Goodput:
    """Return the share of time kept: of every interval one stall, of every failure a restart and half an interval.

    An interval of 0 stands for the best one.
    """
    best = best_checkpoint_interval(stall_s, mtbf_s)
    interval = interval_s or best
    lost = stall_s / (interval + stall_s) + (restart_s + interval / 2) / mtbf_s
    return Goodput(max(0.0, 1 - lost), interval, best, mtbf_s, stall_s)


def total_samples(job: Job) -> float:
    """Return the sequences of all steps; a batch ramp makes its steps smaller."""
    batch, steps = job.train.global_batch, job.train.steps
    if job.optim.ramp is None:
        return float(batch * steps)
    start, increment, over = job.optim.ramp
    sizes = range(start, batch, increment)
    ramp_steps = sum(over / len(sizes) / size for size in sizes) if len(sizes) else 0.0
    return over + (steps - ramp_steps) * batch if steps >= ramp_steps else float(start * steps)


def whole_run(job: Job, step_s: float, state_bytes: float, watts: float) -> Run:
    """Price all steps; `state_bytes` is what the fullest rank saves, `watts` what a device takes."""
    num_gpus = job.world_size
    samples = total_samples(job)
    seconds = samples / job.train.global_batch * step_s
    between = job.machine.mtbf_h * 3600 * job.machine.gpus_per_node / num_gpus
    every = job.checkpoint.every
    interval = 0.0 if every == "auto" else every * step_s if every else seconds
    kept = goodput(state_bytes / COPY_BYTES_PER_S, interval, between, RESTART_S)
    lasting = seconds / kept.share if kept.share else math.inf
    hours = lasting / 3600 * num_gpus
    return Run(samples * job.model.seq, seconds / DAY, lasting / DAY, hours, hours * job.submit.price_per_gpu_hour,
               hours * watts / 1e6, kept)
