"""What a run knows besides tensors: a few numbers, equal on all ranks, kept in every checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

GROWTH_INTERVAL = 1000  # finite steps after which the fp16 loss scale doubles (Micikevicius et al. 2017, section 3.2)


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # steps taken, skipped ones included
    samples: int = 0  # sequences seen
    updates: int = 0  # optimizer updates: steps minus skips
    skips: int = 0  # non-finite steps in a row, up to now
    loss_scale: float = 1.0
    finite_steps: int = 0  # since the loss scale last changed

    def skipped(self) -> None:
        """Note a non-finite step: the update was left out, the loss scale (if one is used) halves."""
        self.skips += 1
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

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return dataclasses.asdict(self)
