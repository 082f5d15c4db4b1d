"""Which rank is slower than its peers: from the seconds that each spends on its own work, waiting left out."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from statistics import median, median_low
from typing import NamedTuple

from hpcpar.layout.mesh import Mesh

REPORT_EVERY = 5
"""Steps between two gathers of all ranks' own seconds."""
_REPORTS, _ENOUGH = 10, 8  # kept; needed before anyone is named: 40 steps
_LEAST = 0.06  # how much slower than its peers a rank must be
_LEAST_CROWDED = 0.4  # the same where ranks share cores: what one gets of them varied by up to 25% (docs/chaos.md)
_SIGMAS = 5.0
_HICCUP_S = 0.005 * REPORT_EVERY  # a difference below 5 ms a step is bookkeeping (rank 0 writes metrics), not a host's
_AGAIN = 100  # reports before a rank is named again


class Slow(NamedTuple):
    """A slow rank; it takes `ratio` times as long as the median of its peers."""

    rank: int
    ratio: float


class Stragglers:
    """Holds the newest reports; rank 0 has one.

    Peers are the ranks of a stage: other stages have other work, and another part of shared cores. A stage of one rank
    has nobody to be compared with.
    """

    def __init__(self, mesh: Mesh, crowded: Collection[int] = ()):
        """`crowded`: the ranks that share cores with others."""
        self._crowded = frozenset(crowded)
        per_stage = mesh.size // mesh.pp_size
        self._peers = [range(first, first + per_stage) for first in range(0, mesh.size, per_stage)]
        self._ratios: deque[list[float]] = deque(maxlen=_REPORTS)
        self._named: dict[int, int] = {}
        self._count = 0

    def add(self, own_s: Sequence[float]) -> list[Slow]:
        """Add every rank's own seconds since the last report; return who is to be named now."""
        self._count += 1
        if self._count == 1:
            return []  # compiling and first touches of memory
        # the lower of two middles: of four peers, a slow one and a hiccup would drag the mean of both
        middles = {peers: max(median_low(own_s[rank] for rank in peers), 1e-9) for peers in self._peers}
        self._ratios.append([_ratio(own_s[rank], middles[peers]) for peers in self._peers for rank in peers])
        if len(self._ratios) < _ENOUGH:
            return []
        # the median over reports: one hiccup, however long, says nothing
        usual = [median(report[rank] for report in self._ratios) for rank in range(len(own_s))]
        found = [slow for peers in self._peers for slow in self._slow_among(peers, usual)]
        new = [slow for slow in found if self._count - self._named.get(slow.rank, -_AGAIN) >= _AGAIN]
        self._named.update({slow.rank: self._count for slow in new})
        return new

    def _slow_among(self, peers: range, usual: list[float]) -> list[Slow]:
        middle = median_low(usual[rank] for rank in peers)  # of two the quicker one
        spread = 1.4826 * median_low(abs(usual[rank] - middle) for rank in peers)
        least = [_LEAST_CROWDED if rank in self._crowded else _LEAST for rank in peers]
        return [Slow(rank, usual[rank] / middle) for rank, more in zip(peers, least, strict=True)
                if usual[rank] > middle + max(more, _SIGMAS * spread)]


def _ratio(own_s: float, middle_s: float) -> float:
    ratio = own_s / middle_s
    return min(ratio, 1.0) if own_s - middle_s < _HICCUP_S else ratio
