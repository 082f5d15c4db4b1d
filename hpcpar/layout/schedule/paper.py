"""Schedules played on paper: when each computation starts and ends, and how much a rank holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from hpcpar.errors import HpcparError
from hpcpar.layout.schedule.actions import Action, Kind, Schedule, dependencies, ends_as


class Span(NamedTuple):
    """When a computation runs."""

    start: float
    end: float


def play_on_paper(schedule: Schedule, duration: Callable[[Action], float],
                  message: Callable[[Action], float] = lambda action: 0.0) -> dict[Action, Span]:
    """Return when each computation runs if every rank goes on as soon as it has what it needs.

    `duration(action)` is how long a computation takes, `message(action)` how long its result travels to another rank
    (never in the sender's way). Raises HpcparError where ranks wait for each other. Cost: O(actions), about 3 us each.
    """
    num_chunks, home = schedule.num_chunks, schedule.chunk_ranks
    spans: dict[Action, Span] = {}
    ended: dict[Action, float] = {}  # a B also as its I and W
    arrives: dict[Action, float] = {}  # ditto, on other ranks
    position = [0] * schedule.num_ranks
    free = [0.0] * schedule.num_ranks
    waiting: dict[Action, int] = {}  # what a rank waits for; no two wait for the same
    runnable = list(range(schedule.num_ranks))
    while runnable:
        rank = runnable.pop()
        order = schedule.orders[rank]
        while position[rank] < len(order):
            action = order[position[rank]]
            needs = dependencies(action, num_chunks)
            missing = next((n for n in needs if n not in ended), None)
            if missing is not None:
                waiting[missing] = rank
                break
            ready = [(ended if home[n.chunk] == rank else arrives)[n] for n in needs]
            start = max([free[rank], *ready])
            free[rank] = end = start + duration(action)
            spans[action] = Span(start, end)
            position[rank] += 1
            for done in ends_as(action):
                ended[done], arrives[done] = end, end + message(action)
                if done in waiting:
                    runnable.append(waiting.pop(done))
    if waiting:
        stuck = sorted((rank, need) for need, rank in waiting.items())  # a rank waits for one thing at a time
        said = ", ".join(f"rank {rank} at {schedule.orders[rank][position[rank]]} for {need}" for rank, need in stuck)
        raise HpcparError(f"schedule deadlocks: {said}")
    return spans


def ticks(schedule: Schedule) -> Callable[[Action], float]:
    """Return the durations of a drawing: one tick each; a whole backward two where others are split."""
    return lambda action: 2 if action.kind is Kind.BACKWARD and schedule.splits else 1


def tick_table(schedule: Schedule) -> list[list[Action | None]]:
    """Return, rank by rank, which action runs in each tick; messages take none."""
    spans = play_on_paper(schedule, ticks(schedule))
    length = int(max(span.end for span in spans.values()))
    rows: list[list[Action | None]] = [[None] * length for _ in schedule.orders]
    for action, (start, end) in spans.items():
        row = rows[schedule.chunk_ranks[action.chunk]]
        row[int(start):int(end)] = [action] * int(end - start)
    return rows


def in_flight(order: tuple[Action, ...]) -> int:
    """Return the most forwards whose activations a rank holds at once, in chunks: until B, or until W where split."""
    held = most = 0
    for action in order:
        held += (action.kind is Kind.FORWARD) - (action.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT))
        most = max(most, held)
    return most
