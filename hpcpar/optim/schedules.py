"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from hpcpar.config.job import Optim, required


def learning_rate(optim: Optim, step: int) -> float:
    """Return the rate of step `step` (from 0): linear warm-up, then a cosine down to min_lr, then min_lr."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    decay_steps = required(optim.decay_steps)
    if step >= decay_steps:
        return optim.min_lr
    progress = (step - optim.warmup_steps) / max(1, decay_steps - optim.warmup_steps)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
