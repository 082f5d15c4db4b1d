"""Dropout that any layout draws alike: a hash of (seed, step, layer, site, global element)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpcpar.nn.counter import keep_mask, make_key


@dataclass(frozen=True)
class Draw:
    """What dropout depends on in one microbatch: the seed, the step, and which tokens these are.

    `tokens` [batch, seq, 1] int64 numbers each token of the run: sample number x seq + position. Under sequence
    parallelism it holds the rank's own positions.
    """

    seed: int
    step: int
    tokens: Tensor


def draw_for(samples: Tensor, positions: range, seq: int, seed: int, step: int) -> Draw:
    """Make the Draw of a microbatch with global sample numbers `samples` [batch] at `positions` of `seq`."""
    places = torch.arange(positions.start, positions.stop, device=samples.device)
    return Draw(seed, step, (samples[:, None] * seq + places[None, :])[..., None])


def dropout(x: Tensor, drop: float, draw: Draw | None, site: str) -> Tensor:
    """Zero elements of x [batch, seq, hidden] with probability `drop` and scale the rest by 1 / (1 - drop).

    `site` names the place in the network ("layers.3.mlp"). Without a draw (evaluation) x passes unchanged.
    """
    if draw is None or drop == 0:
        return x
    hidden = x.shape[-1]
    elements = draw.tokens * hidden + torch.arange(hidden, device=x.device)
    keep = keep_mask(make_key(draw.seed, "dropout", draw.step, site), elements, drop)
    return x * (keep.to(x.dtype) * (1 / (1 - drop)))
