"""How often to save: as often as pays, given what a save costs and how often something fails."""

from __future__ import annotations

import math
import statistics
from collections import deque

FIRST_STEPS = 10
"""Steps before the first save: enough to know how long a step takes."""


def best_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Return the seconds between saves that lose least: sqrt(2 cost mtbf).

    `cost_s` is what a save adds to the run, `mtbf_s` the mean time between failures of the whole job. Source: Young
    1974, Communications of the ACM 17 (9); Daly 2006, Future Generation Computer Systems 22 (3), first order.
    """
    return math.sqrt(2 * cost_s * mtbf_s)


class Rhythm:
    """When the next save is due under `every = "auto"`, from one rank's clock.

    A save costs the time that the loop stood still, and that by which the steps beside it were slower than others.
    """

    def __init__(self, start_step: int, mtbf_s: float):
        self.next_step = start_step + FIRST_STEPS
        self._mtbf_s, self._every = mtbf_s, FIRST_STEPS
        self._alone: deque[float] = deque(maxlen=100)
        self._beside: list[float] = []

    def step(self, step_s: float, saving: bool) -> None:
        """Note a step, and whether a save went on beside it."""
        (self._beside if saving else self._alone).append(step_s)

    def cost_s(self, stall_s: float) -> float:
        """Return what the last save has cost."""
        slower = sum(self._beside) - len(self._beside) * self._step_s
        return stall_s + max(0.0, slower)

    def steps_between(self, stall_s: float, save_s: float) -> int:
        """Return the steps from one save to the next; never less than a save takes. Call it once a save."""
        interval_s = max(best_interval_s(self.cost_s(stall_s), self._mtbf_s), save_s)
        self._beside.clear()
        return max(1, round(interval_s / self._step_s))

    def wait(self, step: int, every: int = 0) -> None:
        """Set when the next save is due: `every` steps (0: as before) after `step`."""
        self._every = every or self._every
        self.next_step = step + self._every

    @property
    def _step_s(self) -> float:
        return statistics.median(self._alone or self._beside or [1.0])
