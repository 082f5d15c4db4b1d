"""Parameters -> flat buckets -> ZeRO shards -> boxes: who reduces, owns, updates and stores which elements.

A bucket is one flat run of gradients. Bucket elements [r x n/d, (r+1) x n/d) belong to dp rank r of d: it gets their
reduced gradient, keeps their master weights and moments, and stores them. Padding makes n divisible by d.
"""

from __future__ import annotations

import math
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

    `late` buckets need another reduction (over tp, or with the tied copy) before the one over dp, so that they wait
    for the end of backward; the others are reduced as soon as their last gradient is there.
    """

    slots: tuple[Slot, ...]
    numel: int
    late: bool

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
    parameters: tuple[Parameter, ...], late: frozenset[str], tp_size: int, tp_rank: int, num_shards: int, limit: int
) -> tuple[Bucket, ...]:
    """Pack a stage's parameters into buckets of about `limit` elements, in the order that backward finishes them.

    `late` names the parameters of late buckets. A tied embedding gets a bucket of its own, so that both stages that
    hold it reduce the same flat run in the same order and stay bit-equal.
    """
    early = [p for p in reversed(parameters) if p.name not in late]
    runs: list[tuple[list[Parameter], bool]] = [([], False)]
    filled = 0
    for parameter in early:
        if filled >= limit:
            runs.append(([], False))
            filled = 0
        runs[-1][0].append(parameter)
        filled += math.prod(parameter.local_shape(tp_size, tp_rank))
    rest = [p for p in parameters if p.name in late]
    runs.append(([p for p in rest if not p.is_vocabulary], True))
    runs += [([p], True) for p in rest if p.is_vocabulary]
    return tuple(_pack(ps, is_late, tp_size, tp_rank, num_shards) for ps, is_late in runs if ps)


def _pack(parameters: list[Parameter], late: bool, tp_size: int, tp_rank: int, num_shards: int) -> Bucket:
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
