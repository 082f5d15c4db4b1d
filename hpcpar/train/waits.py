"""What a rank's steps stand still for: other ranks, by the mesh's axis, and text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

# by group; the others are of all ranks
AXES = {"tp": "tp", "dp": "dp", "dp_across": "dp", "pp_forward": "pp", "pp_backward": "pp"}
TEXT = "text"


class Waits:
    """Cuts seconds that only grow into those of each step: "tp", "pp", "dp", "all" and "text", where there were any.

    On a GPU a rank does not stand still for a collective: there its own stream does, and these are no seconds of it.
    """

    def __init__(self, by_group: Callable[[], Mapping[str, float]], for_text: Callable[[], float]):
        self._by_group, self._for_text = by_group, for_text
        self._before = self._total()

    def since(self) -> dict[str, float]:
        """Return the seconds by axis since the last call."""
        now, before = self._total(), self._before
        self._before = now
        return {axis: seconds - before.get(axis, 0.0) for axis, seconds in now.items()}

    def _total(self) -> dict[str, float]:
        total = {TEXT: self._for_text()}
        for group, seconds in self._by_group().items():
            axis = AXES.get(group, "all")
            total[axis] = total.get(axis, 0.0) + seconds
        return total


def mean_of(everyones: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over ranks by axis; a rank without an axis has waited 0 s for it."""
    axes = sorted({axis for waits in everyones for axis in waits})
    return {axis: sum(waits.get(axis, 0.0) for waits in everyones) / len(everyones) for axis in axes}


def shares(waits: Mapping[str, float], step_s: float) -> str:
    """Tell what is 1% of a step or more: "tp 12% pp 3%", or nothing."""
    return " ".join(f"{axis} {seconds / step_s:.0%}" for axis, seconds in waits.items() if seconds >= 0.01 * step_s)
