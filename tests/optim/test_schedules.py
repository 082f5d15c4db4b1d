from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from hpcpar.config.job import Job, Optim
from hpcpar.config.load import job_from_tables
from hpcpar.config.ramp import batch_size, samples_before
from hpcpar.config.resolve import resolve
from hpcpar.optim.schedules import learning_rate


def job(global_batch: int, ramp: tuple[int, int, int] | None) -> Job:
    optim: dict[str, Any] = {} if ramp is None else {"ramp": ramp}
    return resolve(job_from_tables({"train": {"global_batch": global_batch}, "optim": optim}))


def test_warm_up_is_linear_and_never_zero() -> None:
    optim = Optim(lr=0.8, warmup_steps=4, decay_steps=10)
    assert [learning_rate(optim, step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert learning_rate(optim, 4) == pytest.approx(0.8)


def test_the_cosine_starts_at_lr_and_ends_at_min_lr() -> None:
    optim = Optim(lr=1.0, min_lr=0.1, warmup_steps=5, decay_steps=25)
    rates = [learning_rate(optim, step) for step in range(5, 40)]
    assert rates[0] == 1.0
    assert rates[10] == pytest.approx(0.55)
    assert rates[5] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert all(a > b for a, b in pairwise(rates[:21]))
    assert rates[20:] == [0.1] * 15


@pytest.mark.parametrize(("optim", "rates"), [
    (Optim(lr=1.0, decay_steps=2), [1.0, 0.5, 0.0, 0.0]),
    (Optim(lr=1.0, min_lr=0.5, decay_steps=0), [0.5, 0.5]),
    (Optim(lr=1.0, min_lr=1.0, warmup_steps=2, decay_steps=3), [0.5, 1.0, 1.0, 1.0]),
    (Optim(lr=1.0, min_lr=0.2, warmup_steps=2, decay_steps=1), [0.5, 1.0, 0.2]),
    (Optim(lr=1.0, min_lr=0.2, warmup_steps=2, decay_steps=2), [0.5, 1.0, 0.2]),
])
def test_rates_at_the_edges(optim: Optim, rates: list[float]) -> None:
    assert [learning_rate(optim, step) for step in range(len(rates))] == pytest.approx(rates)


RAMPS = [(32, (8, 8, 100)), (16, (4, 4, 0)), (32, (32, 8, 100)), (48, (16, 16, 1000)), (6, (2, 1, 37)), (8, None)]


@pytest.mark.parametrize(("global_batch", "ramp"), RAMPS)
def test_the_ramp_is_the_one_defined_step_by_step(global_batch: int, ramp: tuple[int, int, int] | None) -> None:
    wish, samples = job(global_batch, ramp), 0
    for step in range(120):
        if ramp is None or ramp[0] == global_batch:
            want = global_batch
        else:
            start, increment, over = ramp
            sizes = list(range(start, global_batch, increment))  # each holds for an equal share of `over` samples
            want = next((size for i, size in enumerate(sizes) if samples * len(sizes) < (i + 1) * over), global_batch)
        assert batch_size(wish, samples) == want
        assert samples_before(wish, step) == samples
        samples += want


@pytest.mark.parametrize(("global_batch", "ramp"), RAMPS)
def test_batches_grow_from_start_to_the_whole(global_batch: int, ramp: tuple[int, int, int] | None) -> None:
    wish = job(global_batch, ramp)
    sizes = [batch_size(wish, samples) for samples in range(0, 1200)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == global_batch
    assert sizes[0] == (ramp[0] if ramp and ramp[2] else global_batch)
    assert len(set(sizes)) == (1 if not ramp or not ramp[2] else (global_batch - ramp[0]) // ramp[1] + 1)


def test_samples_before_a_far_step_needs_no_walk_there() -> None:
    assert samples_before(job(32, (8, 8, 100)), 10**15) > 31 * 10**15
