"""Sharded weights (ZeRO 3): a unit's are gathered over dp before it is computed with, and released after.

    forward    gather unit, begin with the next  ->  compute  ->  release
    backward   the same from the last unit to the first, around each unit's backward

A unit is the embedding, a layer, the final norm or the head; the first and the last are needed in forward only.
Source: Rajbhandari et al. 2020, arXiv 1910.02054, section 5.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from hpcpar.comm.collectives import wait
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
            held = _InBackward.apply(x, partial(self.release, unit))
            out: Tensor = _InBackward.apply(compute(held, *rest), partial(self._acquire, unit, self._backward))
        else:
            out = compute(x, *rest)
        self.release(unit)
        return out

    def _acquire(self, unit: str, after: dict[str, str]) -> None:
        for each in (unit, after.get(unit)):
            if each is not None and each not in self._under_way:
                self._under_way[each] = [flat.start_gather() for flat in self._flats[each]]
        for work in self._under_way.pop(unit):
            wait(work)

    def release(self, unit: str) -> None:
        """Keep a unit's owned weights only."""
        for flat in self._flats[unit]:
            flat.release()


class _InBackward(Function):
    """Passes x on; in backward makes a call before it passes the gradient on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return grads[0], None
