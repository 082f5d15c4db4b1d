"""One command, several runs: sweeps over options, and a target that may take many jobs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from hpcpar.config.job import Job
from hpcpar.config.load import job_from_tables, override, parse_overrides
from hpcpar.config.ramp import batch_size, samples_before
from hpcpar.config.resolve import resolve
from hpcpar.errors import UserError
from hpcpar.units import COUNTS


class Point(NamedTuple):
    """One run of a sweep; `name` is its folder inside the sweep's, empty where there is no sweep."""

    name: str
    job: Job


def points(job: Job, sweep: Sequence[str]) -> list[Point]:
    """Return a run for every combination of the swept values; ["optim.lr=1e-4,3e-4"] makes two."""
    axes = [_axis(text) for text in sweep]
    found = []
    for values in itertools.product(*axes):
        swept = job
        for name, text in values:
            (dotted, value), = parse_overrides([f"--{name}={text}"]).items()
            table, _, key = dotted.partition(".")
            swept = _checked(swept, table, key, value)
        found.append(Point("_".join(f"{name}={text}".replace("/", "-") for name, text in values), swept))
    return found


def until(job: Job, target: str) -> Job:
    """Return `job` with the steps that reach `target`: a number of steps, or tokens as 180B (K, M, B, T).

    The learning rate's decay stays that of the job: stopping earlier, or going on longer, must not bend the curve.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", target)
    if match is None or (not match[2] and "." in match[1]):
        raise UserError("--until", f"{target} is neither steps nor tokens", "write 26158 (steps) or 180B (tokens)")
    steps = int(match[1]) if not match[2] else _steps_for(job, int(float(match[1]) * COUNTS[match[2]]))
    decay_steps = job.train.steps if job.optim.decay_steps is None else job.optim.decay_steps
    return override(job, train={"steps": steps}, optim={"decay_steps": decay_steps})


def _steps_for(job: Job, tokens: int) -> int:
    """Return the least number of steps that see `tokens`."""
    resolve(job)  # a ramp that does not add up would never end
    samples, step = -(-tokens // job.model.seq), 0
    while samples_before(job, step) < samples and batch_size(job, samples_before(job, step)) != job.train.global_batch:
        step += 1
    return step + max(0, -(-(samples - samples_before(job, step)) // job.train.global_batch))


def _axis(text: str) -> list[tuple[str, str]]:
    name, equals, values = text.removeprefix("--").partition("=")
    if not equals or not values:
        raise UserError("--sweep", f"{text} names no values", "write --sweep optim.lr=1e-4,3e-4")
    found = re.findall(r"\[[^\]]*\]|[^,]+", values)  # a list in brackets is one value
    if len(set(found)) < len(found):
        raise UserError("--sweep", f"{text} has a value twice", "leave one out")
    return [(name, value) for value in found]


def _checked(job: Job, table: str, key: str, value: object) -> Job:
    one = job_from_tables({table: {key: value}})  # the checks of type and least value
    return override(job, **{table: {key: getattr(getattr(one, table), key)}})
