"""Pipelines without a flush, on paper only: they never drain, and compute gradients with old weights.

Both run 1F1B over the microbatches of all steps in one stream, so that the bubble is paid once a run. No rank here
plays them: a run would no longer equal one process.
"""

from __future__ import annotations

from typing import NamedTuple

from hpcpar.errors import UserError
from hpcpar.layout.schedule.actions import Action, Kind, Schedule
from hpcpar.layout.schedule.named import make_schedule

STALE = ("pipedream", "2bw")


class Staleness(NamedTuple):
    """A stage's weights: how many copies it keeps, and how many updates old the ones are that a gradient is of."""

    versions: int
    delay: int


def staleness(name: str, num_ranks: int, num_microbatches: int) -> list[Staleness]:
    """Return each stage's staleness.

    PipeDream updates after every backward, and stashes the weights of each microbatch in flight: stage i of p keeps
    p - i copies and is p - 1 - i updates behind (Narayanan et al. 2019, SOSP, section 3.3). PipeDream-2BW updates
    after a step's microbatches (at least p) and keeps two copies; every stage is one update behind (Narayanan et al.
    2021, arXiv 2006.09503, section 3.1).
    """
    if name == "pipedream":
        return [Staleness(num_ranks - rank, num_ranks - 1 - rank) for rank in range(num_ranks)]
    if num_microbatches < num_ranks:
        raise UserError("train.global_batch", f"2bw needs at least pp = {num_ranks} microbatches a step, not "
                        f"{num_microbatches}", f"nearest legal: {num_ranks} microbatches a replica")
    return [Staleness(2, 1)] * num_ranks


def stream(num_ranks: int, num_microbatches: int, steps: int) -> Schedule:
    """Make the schedule of `steps` steps without a flush between them; microbatches are numbered through."""
    return make_schedule("1f1b", num_ranks, num_microbatches * steps)


def updates_behind(order: tuple[Action, ...], microbatches_an_update: int) -> list[int]:
    """Return, microbatch by microbatch, how many updates an order makes between its forward and its backward."""
    backwards, before = 0, {}
    behind = []
    for kind, m, _ in order:
        if kind is Kind.FORWARD:
            before[m] = backwards // microbatches_an_update
        else:
            behind.append(backwards // microbatches_an_update - before[m])
            backwards += 1
    return behind
