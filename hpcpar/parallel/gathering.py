"""Sharded weights (ZeRO 3): a unit's are gathered over dp before it is computed with, and released after.

    forward    gather unit, begin with the next  ->  compute  ->  release
    backward   the same from the last unit to the first, around each unit's backward

A unit is the embedding, a layer, the final norm or the head; the first and the last are needed in forward only.
Source: Rajbhandari et al. 2020, arXiv 1910.02054, section 5.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from hpcpar.layout.layout import Layout
from hpcpar.layout.schedule import Kind
from hpcpar.layout.traffic import needs_weights
from hpcpar.nn.transformer import Transformer
from hpcpar.parallel.buckets import FlatBucket


def apply_gathering(network: Transformer, layout: Layout, buckets: Sequence[FlatBucket]) -> None:
    """Gather a chunk's weights unit by unit, in place, where they are sharded and not held in common."""
    if any(flat.gathers for flat in buckets):
        network.run = Gathering(network.units(), layout, buckets).run


class Gathering:
    """The weights of one chunk's units."""

    def __init__(self, units: list[str], layout: Layout, buckets: Sequence[FlatBucket]):
        self._flats = {unit: [flat for flat in buckets if flat.gathers
                              and flat.bucket.unit == layout.unit_of_weights(unit)] for unit in units}
        back = [unit for unit in reversed(units) if needs_weights(unit, Kind.BACKWARD)]
        self._forward, self._backward = dict(pairwise(units)), dict(pairwise(back))  # the unit after each
        self._under_way: dict[str, list[dist.Work | None]] = {}

    def run(self, unit: str, compute: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
        """Take the place of compute(x, *rest), with the unit's weights there in forward and backward."""
        self._acquire(unit, self._forward)
        if torch.is_grad_enabled() and needs_weights(unit, Kind.BACKWARD):
            out: Tensor = _After.apply(compute(_Before.apply(x, self, unit), *rest), self, unit)
        else:
            out = compute(x, *rest)
        self.release(unit)
        return out

    def acquire_backward(self, unit: str) -> None:
        """Have a unit's weights for its backward."""
        self._acquire(unit, self._backward)

    def _acquire(self, unit: str, after: dict[str, str]) -> None:
        for each in (unit, after.get(unit)):
            if each is not None and each not in self._under_way:
                self._under_way[each] = [flat.start_gather() for flat in self._flats[each]]
        for work in self._under_way.pop(unit):
            if work is not None:
                work.wait()

    def release(self, unit: str) -> None:
        """Keep a unit's owned weights only."""
        for flat in self._flats[unit]:
            flat.release()


class _Before(Function):
    """Passes a unit's input on; in backward it is the last of the unit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gathering: Gathering, unit: str) -> Tensor:
        ctx.release = gathering.release
        ctx.unit = unit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.release(ctx.unit)
        return grads[0], None, None


class _After(Function):
    """Passes a unit's output on; in backward it is the first of the unit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gathering: Gathering, unit: str) -> Tensor:
        ctx.acquire = gathering.acquire_backward
        ctx.unit = unit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.acquire(ctx.unit)
        return grads[0], None, None
