"""What may change between a saved run and the one that goes on from it, and from which set it does; torch-free.

The loop obeys this table and `hpcpar ckpt check` prints it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from hpcpar.checkpoint.verify import newest_whole, offer, published_sets, verify_together
from hpcpar.comm.control import Control
from hpcpar.config.job import Job
from hpcpar.data.sampler import SampleOrder
from hpcpar.errors import CheckpointError, UserError
from hpcpar.train.state import Progress

T = TypeVar("T")


class Rule(NamedTuple):
    """Whether an option, or a whole table, may change, and why."""

    allowed: bool
    why: str


class Change(NamedTuple):
    """An option that differs."""

    option: str
    saved: Any
    now: Any
    rule: Rule


_NO_STATE = Rule(True, "touches nothing that is saved")
# an option goes before its table
RULES: tuple[tuple[str, Rule], ...] = (
    ("model.dropout", Rule(True, "applies from the next step; its numbers are a function of seed, step and element")),
    ("model.init_std", Rule(True, "was used once, for the first weights")),
    ("model.z_loss", Rule(True, "a term of the gradient from the next step on")),
    ("model.embedding_grad", Rule(True, "a factor on a gradient from the next step on")),
    ("model", Rule(False, "the saved tensors are of another network")),
    ("layout", Rule(True, "a set holds boxes of whole tensors: each rank reads the boxes of its own layout")),
    ("train.seed", Rule(False, "sample order and dropout are functions of it")),
    ("train.precision", Rule(True, "fp64 jobs keep fp64 weights and moments, all others fp32: these are cast once, as "
                                   "they are read; fp16 begins with a fresh loss scale")),
    ("train.global_batch", Rule(True, "the data position is a sample number; the schedules go on by step")),
    ("train.microbatch", Rule(True, "the same samples; only sums are made in another order")),
    ("train.steps", Rule(True, "where the run ends; set optim.decay_steps to keep the old decay")),
    ("train", _NO_STATE),
    ("optim.decay_steps", Rule(True, "the learning rate jumps onto the new curve")),
    ("optim.ramp", Rule(True, "the batch follows the new ramp from the saved sample number")),
    ("optim", Rule(True, "applies from the next step; moments are kept")),
    ("data.store", Rule(True, "by its fingerprint: the same text may lie elsewhere")),
    ("data.validation", Rule(False, "moves the border between training and held-out text")),
    ("data", _NO_STATE),
    ("checkpoint", _NO_STATE),
    ("stability", _NO_STATE),
    ("health", _NO_STATE),
    ("machine", _NO_STATE),
    ("submit", _NO_STATE),
)


def changes(saved: Mapping[str, Any], job: Job) -> list[Change]:
    """List the options in which `job` differs from a saved one (tables, as a manifest's state holds them)."""
    found = []
    for table, values in dataclasses.asdict(job).items():
        for key, value in values.items():
            # JSON has no tuples; an option younger than the set has its default
            before = saved.get(table, {}).get(key, value)
            now = _plain(value)
            if before != now:
                found.append(Change(f"{table}.{key}", before, now, _rule(f"{table}.{key}")))
    return found


def check_same(state: Mapping[str, Any], job: Job, order: SampleOrder, path: Path) -> None:
    """Refuse to go on with another model or other data: the curve would break without a word."""
    imported = state["data"] is None  # has seen no text: any may follow, in any order
    for option, saved, now, rule in changes(state["job"], job):
        if imported and not option.startswith("model."):
            continue
        if not rule.allowed:
            raise UserError(option, f"is {now}, but {path} was saved with {saved}: {rule.why}",
                            f"write {option.partition('.')[2]} = {saved}, or use another --run folder")
    if not imported and state["data"] != order.fingerprint:
        raise UserError("data.store", f"is not the text (or weights, or tokenizer) that {path} was trained on",
                        "use the same store, or another --run folder")


def saved_progress(state: Mapping[str, Any], job: Job, fresh: Progress) -> Progress:
    """Return how far the saved run had come; a change of precision takes the loss scale of a `fresh` start."""
    if state["data"] is None:
        return fresh
    progress = Progress(**state["progress"])
    if state["job"]["train"]["precision"] != job.train.precision:
        progress.loss_scale, progress.finite_steps = fresh.loss_scale, 0
    return progress


def or_offer(path: Path, control: Control, load: Callable[[], T]) -> T:
    """Return what `load` reads from the set to go on from; it raises the same on all ranks. Every rank must call.

    Raises: UserError that names files and tensors hit, and the newest set that is whole: to fall back is for people.
    """
    try:
        return load()
    except CheckpointError as error:
        checkpoints = path.parent
        older = control.broadcast([p for p in published_sets(checkpoints) if p != path] if control.rank == 0 else None)
        good = newest_whole(older, lambda each: verify_together(each, control))
        fix = offer(checkpoints, [good] if good else [])
        raise UserError(path.name, f"the newest set is damaged: {error}", fix) from None


def _rule(option: str) -> Rule:
    return next(rule for name, rule in RULES if option == name or option.partition(".")[0] == name)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
