"""Parameters -> flat buckets -> ZeRO shards -> boxes: who reduces, owns, updates and stores which elements.

A bucket is one flat run of gradients. Bucket elements [r x n/d, (r+1) x n/d) belong to dp rank r of d: it gets their
reduced gradient, keeps their master weights and moments, and stores them. Padding makes n divisible by d.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from hpcpar.layout.boxes import Box, flat_range_boxes
from hpcpar.layout.parameters import Parameter


@dataclass(frozen=True)
class Slot:
    """A parameter's place in a bucket: elements [start, start + numel(local_shape))."""

    parameter: Parameter
    start: int
    local_shape: tuple[int, ...]
    box: Box

    @property
    def numel(self) -> int:
        """Elements of the local tensor, padding rows included."""
        return math.prod(self.local_shape)


@dataclass(frozen=True)
class Bucket:
    """A flat run of parameters with equal treatment.

    It is reduced over dp as soon as its last gradient is there. `late` names what its gradients need besides, after the
    last backward and on the owned shard alone, since sums may change places: "tp", a sum over tp; "kv", a sum over the
    tp ranks that share a kv head; "tied", the other end's gradient of a tied embedding; "" is nothing.
    """

    slots: tuple[Slot, ...]
    numel: int
    late: str

    @property
    def unit(self) -> str:
        """The network's part that its parameters belong to, where buckets are cut by units."""
        return self.slots[0].parameter.unit

    def shard(self, num_shards: int, index: int) -> tuple[int, int]:
        """Return the (start, stop) that a dp rank owns."""
        size = self.numel // num_shards
        return index * size, (index + 1) * size


@dataclass(frozen=True)
class Piece:
    """A box of a logical tensor that lies flat in an owned shard, at `start` from the shard's beginning."""

    bucket: int
    parameter: Parameter
    start: int
    box: Box


def make_buckets(
    parameters: tuple[Parameter, ...], late: Callable[[Parameter], str], apart: Callable[[Parameter], Hashable],
    tp_size: int, tp_rank: int, num_shards: int, limit: int
) -> tuple[Bucket, ...]:
    """Pack a stage's parameters into buckets of about `limit` elements, in the order in which backward finishes them.

    Parameters between which `late` or `apart` differ are not put together. Late buckets have no limit. A tied embedding
    so gets a bucket of its own, and both stages that hold it reduce the same flat run in the same order.
    """
    runs: dict[Hashable, list[list[int]]] = {}
    filled: dict[Hashable, int] = {}
    for index in reversed(range(len(parameters))):
        parameter = parameters[index]
        key = late(parameter), apart(parameter)
        if key not in runs or (filled[key] >= limit and not late(parameter)):
            runs.setdefault(key, []).append([])
            filled[key] = 0
        runs[key][-1].append(index)
        filled[key] += math.prod(parameter.local_shape(tp_size, tp_rank))
    finished = sorted((run for of_key in runs.values() for run in of_key), key=lambda run: -run[-1])
    return tuple(_pack([parameters[i] for i in run], late(parameters[run[0]]), tp_size, tp_rank, num_shards)
                 for run in finished)


def _pack(parameters: list[Parameter], late: str, tp_size: int, tp_rank: int, num_shards: int) -> Bucket:
    slots, start = [], 0
    for parameter in parameters:
        slot = Slot(parameter, start, parameter.local_shape(tp_size, tp_rank), parameter.box(tp_size, tp_rank))
        slots.append(slot)
        start += slot.numel
    # 16 elements keep every shard's start on a 64-byte line, which vector units and MPI like
    unit = 16 * num_shards
    return Bucket(tuple(slots), -(-start // unit) * unit, late)


def owned_pieces(buckets: tuple[Bucket, ...], num_shards: int, index: int) -> list[Piece]:
    """List the boxes that a dp rank owns, bucket by bucket, without padding."""
    pieces = []
    for number, bucket in enumerate(buckets):
        low, high = bucket.shard(num_shards, index)
        for slot in bucket.slots:
            first, last = max(low, slot.start), min(high, slot.start + slot.box.numel)
            for at, box in flat_range_boxes(slot.box, first - slot.start, last - slot.start):
                pieces.append(Piece(number, slot.parameter, slot.start + at - low, box))
    return pieces
