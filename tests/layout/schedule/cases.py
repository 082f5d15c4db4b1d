"""Legal combinations of schedule, ranks, microbatches and chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hpcpar.layout.schedule import ORDERS, Schedule, make_schedule

CHUNKS = {"gpipe": (1,), "1f1b": (1,), "interleaved": (2, 3), "breadth-first": (1, 2), "zero-bubble": (1, 2),
          "zbv": (2,), "dualpipev": (2,)}
NAMES = list(ORDERS)
Case = tuple[int, int, int]  # ranks, microbatches, chunks a rank


def cases(name: str, ranks: Iterable[int] = range(1, 9), microbatches: Iterable[int] = range(1, 17)) -> Iterator[Case]:
    """Yield what a job may ask for."""
    for p in ranks:
        for m in microbatches:
            for v in CHUNKS[name]:
                rounds = name == "interleaved" or (name == "zero-bubble" and v > 1)
                if (not rounds or m % p == 0) and (name != "dualpipev" or m >= 2 * p):
                    yield p, m, v


def schedules(name: str, ranks: Iterable[int] = range(1, 9),
              microbatches: Iterable[int] = range(1, 17)) -> Iterator[tuple[Case, Schedule]]:
    """Yield them with their schedules."""
    for p, m, v in cases(name, ranks, microbatches):
        yield (p, m, v), make_schedule(name, p, m, v)
