"""Box arithmetic: a box is (offset, size) in the global coordinates of a logical tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor; `offset` and `size` have one entry a dim."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements inside."""
        return math.prod(self.size)

    @property
    def end(self) -> tuple[int, ...]:
        """First coordinates past the box."""
        return tuple(o + s for o, s in zip(self.offset, self.size, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """Return the common part, or None where there is none."""
        low = tuple(map(max, self.offset, other.offset))
        size = tuple(b - a for a, b in zip(low, map(min, self.end, other.end), strict=True))
        return Box(low, size) if all(s > 0 for s in size) else None

    def slices(self, within: Box | None = None) -> tuple[slice, ...]:
        """Return numpy slices of this box, relative to `within` (default: the whole tensor)."""
        base = within.offset if within else (0,) * len(self.offset)
        return tuple(slice(o - b, o - b + s) for o, b, s in zip(self.offset, base, self.size, strict=True))


def whole(shape: tuple[int, ...]) -> Box:
    """Return the box of a whole tensor."""
    return Box((0,) * len(shape), shape)


def shard_units(units: int, num_shards: int, shard: int) -> tuple[int, int]:
    """Return (first unit, count) of a shard of `units` indivisible things, shards as even as can be.

    With fewer units than shards, neighbouring shards hold the same unit (grouped-query heads under a larger tp).
    """
    if units < num_shards:
        return shard * units // num_shards, 1
    first = shard * units // num_shards
    return first, (shard + 1) * units // num_shards - first


def flat_range_boxes(box: Box, start: int, stop: int) -> list[tuple[int, Box]]:
    """Cut elements [start, stop) of a row-major `box` into boxes of the logical tensor.

    Returns (flat offset inside the box, box) pairs in flat order: at most 2 x dims - 1 of them. A ZeRO shard is
    such a range, and this is what makes it a set of boxes that any other layout can intersect.
    """
    if start >= stop:
        return []
    if len(box.size) == 1 or (start, stop) == (0, box.numel):
        if (start, stop) == (0, box.numel):
            return [(0, box)]
        return [(start, Box((box.offset[0] + start,), (stop - start,)))]
    row = math.prod(box.size[1:])
    found: list[tuple[int, Box]] = []
    first_full, last_full = -(-start // row), stop // row
    if first_full > last_full:  # inside one row
        return _inside_row(box, last_full, row, start, stop)
    if start < first_full * row:
        found += _inside_row(box, first_full - 1, row, start, first_full * row)
    if first_full < last_full:
        body = Box((box.offset[0] + first_full, *box.offset[1:]), (last_full - first_full, *box.size[1:]))
        found.append((first_full * row, body))
    if last_full * row < stop:
        found += _inside_row(box, last_full, row, last_full * row, stop)
    return found


def _inside_row(box: Box, index: int, row: int, start: int, stop: int) -> list[tuple[int, Box]]:
    """Cut a range that lies in one row, by cutting the row's own (dims - 1)-dimensional box."""
    inner = flat_range_boxes(Box(box.offset[1:], box.size[1:]), start - index * row, stop - index * row)
    return [(index * row + at, Box((box.offset[0] + index, *b.offset), (1, *b.size))) for at, b in inner]
