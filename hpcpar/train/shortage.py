"""A memory that is full is explained: what was foretold of it, by category, and which changes need less."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hpcpar.config.job import Job
from hpcpar.errors import RunError, UserError
from hpcpar.layout.mesh import Coordinates
from hpcpar.planner.plan import make_plan
from hpcpar.planner.search import remedies, trainable
from hpcpar.train.metrics import peak_memory
from hpcpar.units import format_bytes

_ON_CPU = "DefaultCPUAllocator: can't allocate memory"  # torch raises a RuntimeError there


def is_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device's or a host's memory is full."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _ON_CPU in str(error)


@contextmanager
def explained(job: Job, at: Coordinates, device: torch.device) -> Iterator[None]:
    """Turn an error of memory inside into one that says more. Raises: RunError, so that no requeue repeats it."""
    try:
        yield
    except Exception as error:
        if not is_of_memory(error):
            raise
        raise RunError(f"memory is full: {error}; {explain(job, at, device)}") from error


def explain(job: Job, at: Coordinates, device: torch.device) -> str:
    """Say what the planner foretells of this rank's memory, what it has taken, and what would need less."""
    taken = f"this rank has taken {format_bytes(peak_memory(device))}"
    try:
        plan = make_plan(job)
    except UserError as error:  # of the planner's table of machines
        return f"{taken}; not foretold: {error}"
    foretold = plan.memory[at.pp_rank]
    parts = ", ".join(f"{name} {format_bytes(value)}" for name, value in dataclasses.asdict(foretold).items() if value)
    changes = remedies(plan, accept=trainable)
    return (f"{taken}; foretold for {plan.machine.name}: {format_bytes(foretold.total)} ({parts}); "
            f"less is needed with {' or '.join(changes) or 'more ranks: see hpcpar plan --search'}")
