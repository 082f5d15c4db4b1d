"""The order of a rank's forwards and backwards, schedule by schedule: with whole backwards here.

Each function is of (ranks p, microbatches m, chunks a rank v, rank) and gives the actions of that rank.

1F1B at 3 ranks and 4 microbatches (time goes right; F and B of equal length):

    rank 0  F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3
    rank 1  .. F0 F1 .. B0 F2 B1 F3 B2 .. B3 ..
    rank 2  .. .. F0 B0 F1 B1 F2 B2 F3 B3 .. ..
"""

from __future__ import annotations

from hpcpar.layout.schedule.actions import Action, Kind


def gpipe(p: int, m: int, v: int, rank: int) -> list[Action]:
    """All forwards, then all backwards. In flight: every microbatch. Source: Huang et al. 2019, arXiv 1811.06965."""
    return [Action(kind, i, rank) for kind in (Kind.FORWARD, Kind.BACKWARD) for i in range(m)]


def one_f_one_b(p: int, m: int, v: int, rank: int) -> list[Action]:
    """Warm up, then alternate one forward and one backward, then drain.

    In flight on rank i: min(m, p - i). Source: PipeDream-flush, Narayanan et al. 2021, arXiv 2104.04473.
    """
    return alternate(*in_rounds(p, m, 1, rank, Kind.BACKWARD), warm_up=p - 1 - rank)


def interleaved(p: int, m: int, v: int, rank: int) -> list[Action]:
    """1F1B over v chunks a rank (chunk c on rank c mod p), microbatches in rounds of p: the bubble shrinks by v.

    In flight on rank 0: p v + p - 1 chunks' worth. m is a multiple of p. Source: Narayanan et al. 2021, section 2.2.
    """
    return alternate(*in_rounds(p, m, v, rank, Kind.BACKWARD), warm_up=(v - 1) * p + 2 * (p - 1 - rank))


def breadth_first(p: int, m: int, v: int, rank: int) -> list[Action]:
    """All microbatches through a chunk before the next chunk; backwards in the opposite order.

    A chunk's gradients are complete early, one chunk after the other, which suits their reduction over dp. In flight:
    m v chunks' worth. Source: Lamy-Poirier 2022, arXiv 2211.05953.
    """
    forwards = [Action(Kind.FORWARD, i, chunk * p + rank) for chunk in range(v) for i in range(m)]
    return forwards + [a._replace(kind=Kind.BACKWARD) for a in reversed(forwards)]


def in_rounds(p: int, m: int, v: int, rank: int, backward: Kind) -> tuple[list[Action], list[Action]]:
    """Return forwards and backwards in rounds: p microbatches through a rank's first chunk, then through its next."""
    rounds = [range(first, min(first + p, m)) for first in range(0, m, p)]
    chunks = range(rank, p * v, p)
    forwards = [Action(Kind.FORWARD, i, chunk) for some in rounds for chunk in chunks for i in some]
    backwards = [Action(backward, i, chunk) for some in rounds for chunk in reversed(chunks) for i in some]
    return forwards, backwards


def alternate(forwards: list[Action], backwards: list[Action], warm_up: int) -> list[Action]:
    """Play `warm_up` forwards, then a forward and a backward in turn, then the backwards that are left."""
    order = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(forwards[warm_up:]):]
