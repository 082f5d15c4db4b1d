"""What a run knows besides tensors: a few numbers, equal on all ranks, kept in every checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FIRST_LOSS_SCALE = 65536.0  # of fp16: halved until gradients are finite, so that too large costs a few steps
GROWTH_INTERVAL = 1000  # finite steps after which the fp16 loss scale doubles (Micikevicius et al. 2017, section 3.2)


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # steps taken, skipped ones included
    samples: int = 0  # sequences seen
    updates: int = 0  # optimizer updates: steps minus skips
    skips: int = 0  # steps skipped in a row, up to now
    loss_scale: float = 1.0
    finite_steps: int = 0  # since the loss scale last changed
    recent: list[list[float]] = field(default_factory=list)  # loss and log gradient norm of the newest updates
    rollbacks: int = 0  # in the whole run
    left_out: list[list[int]] = field(default_factory=list)  # sample numbers [from, to) that nobody trains on

    def skipped(self, finite: bool = False) -> None:
        """Note a step without update; after a non-finite one the loss scale (if one is used) halves."""
        self.skips += 1
        if finite:
            return
        self.finite_steps = 0
        if self.loss_scale > 1:
            self.loss_scale /= 2

    def updated(self, scaled: bool) -> None:
        """Note an update; `scaled` says that a dynamic loss scale is in use."""
        self.updates += 1
        self.skips = 0
        self.finite_steps += 1
        if scaled and self.finite_steps >= GROWTH_INTERVAL:
            self.loss_scale *= 2
            self.finite_steps = 0

    def sample_numbers(self, places: np.ndarray) -> np.ndarray:
        """Map places in the run (0 is its first sequence) to sample numbers: the same, past what is left out."""
        numbers = places
        for start, stop in self.left_out:  # in order, apart from one another
            numbers = np.where(numbers >= start, numbers + (stop - start), numbers)
        return numbers

    def leave_out(self, start: int, stop: int) -> None:
        """Leave out sample numbers [start, stop) from now on; joined with what is left out already."""
        joined: list[list[int]] = []
        for low, high in sorted([*self.left_out, [start, stop]]):
            if joined and low <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], high)
            else:
                joined.append([low, high])
        self.left_out = joined

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return dataclasses.asdict(self)
