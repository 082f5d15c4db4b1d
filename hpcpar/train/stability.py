"""Which steps are not to be trusted: decided from two numbers that all ranks share, so that all decide alike."""

from __future__ import annotations

import math
from statistics import median

from hpcpar.config.job import Stability
from hpcpar.train.state import Progress

WINDOW = 64  # updates that a step is held against: enough for a median, few enough to follow the curve
_SIGMA = 1.4826  # of a normal distribution, in median absolute deviations
_FLOOR = 0.01  # a window of equal values must not turn the next ulp into a spike


def robust_z(value: float, window: list[float]) -> float:
    """Return how many robust standard deviations a value lies above a window's median."""
    middle = median(window)
    spread = _SIGMA * median(abs(each - middle) for each in window)
    return (value - middle) / max(spread, _FLOOR)


def distrust(wish: Stability, progress: Progress, loss: float, grad_norm: float) -> str:
    """Return why a step must not change the weights, or an empty text.

    Loss and logarithm of the gradient norm are each held against the newest WINDOW updates; nothing is a spike until
    the window is full. The decision is a pure function of what all ranks have: no rank can skip alone.
    """
    if not (math.isfinite(grad_norm) and math.isfinite(loss)):
        return "not finite"
    if not wish.spike or len(progress.recent) < WINDOW or grad_norm == 0:
        return ""
    for name, value, column in (("loss", loss, 0), ("gradient norm", math.log(grad_norm), 1)):
        z = robust_z(value, [row[column] for row in progress.recent])
        if z > wish.spike:
            return f"{name} {z:.0f} deviations above the last {WINDOW} updates"
    return ""


def remember(wish: Stability, progress: Progress, loss: float, grad_norm: float) -> None:
    """Keep an update's figures in the window."""
    if wish.spike:
        row = [loss, math.log(grad_norm) if grad_norm > 0 else 0.0]
        progress.recent = [*progress.recent, row][-WINDOW:]
