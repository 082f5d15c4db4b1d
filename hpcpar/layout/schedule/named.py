"""Schedules by the name that a job gives."""

from __future__ import annotations

from collections.abc import Callable

from hpcpar.layout.schedule.actions import Action, Kind, Schedule
from hpcpar.layout.schedule.orders import breadth_first, gpipe, interleaved, one_f_one_b
from hpcpar.layout.schedule.zero_bubble import dualpipev, zbv, zero_bubble

ORDERS: dict[str, Callable[[int, int, int, int], list[Action]]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "breadth-first": breadth_first,
    "zero-bubble": zero_bubble,
    "zbv": zbv,
    "dualpipev": dualpipev,
}
V_SHAPED = ("zbv", "dualpipev")


def make_schedule(name: str, num_ranks: int, num_microbatches: int, chunks: int = 1) -> Schedule:
    """Make a named schedule for `chunks` chunks a rank. Cost: O(actions), about a microsecond each."""
    make = ORDERS[name]
    return Schedule(tuple(tuple(make(num_ranks, num_microbatches, chunks, r)) for r in range(num_ranks)))


def place_chunks(name: str, num_ranks: int, chunks: int = 1) -> tuple[int, ...]:
    """Return the pipeline rank of every chunk: in a loop, or down and up again in a V.

        loop  chunk 0 1 2 3 4 5 6 7      V  chunk 0 1 2 3 4 5 6 7
              rank  0 1 2 3 0 1 2 3         rank  0 1 2 3 3 2 1 0
    """
    ranks = tuple(range(num_ranks))
    return ranks + ranks[::-1] if name in V_SHAPED else ranks * chunks


def forward_only(chunk_ranks: tuple[int, ...], num_microbatches: int) -> Schedule:
    """Make the schedule of a validation: rounds of as many microbatches as ranks."""
    num_ranks = 1 + max(chunk_ranks)
    orders: list[list[Action]] = [[] for _ in range(num_ranks)]
    for first in range(0, num_microbatches, num_ranks):
        for chunk, rank in enumerate(chunk_ranks):
            orders[rank] += [Action(Kind.FORWARD, m, chunk)
                             for m in range(first, min(first + num_ranks, num_microbatches))]
    return Schedule(tuple(map(tuple, orders)))
