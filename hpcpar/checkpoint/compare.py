"""Compare two sets element by element, whatever layouts wrote them, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpcpar.checkpoint.format import Manifest, read_manifest
from hpcpar.checkpoint.load import load_box
from hpcpar.layout.boxes import Box, whole

CHUNK_ELEMENTS = 1 << 22  # of each set in memory at once


class Difference(NamedTuple):
    """How a tensor differs in one kind; `at` is the element that differs most."""

    kind: str
    tensor: str
    why: str  # where the tensors cannot be compared
    num_differing: int = 0
    numel: int = 0
    largest: float = 0.0
    relative: float = 0.0
    at: tuple[int, ...] = ()
    first: float = 0.0
    second: float = 0.0

    def __str__(self) -> str:
        if self.why:
            return f"{self.kind} {self.tensor}: {self.why}"
        return (f"{self.kind} {self.tensor}: {self.num_differing:,} of {self.numel:,} elements differ; most at "
                f"{list(self.at)}: {self.first:.9g} and {self.second:.9g}, absolute {self.largest:.3g}, "
                f"relative {self.relative:.3g}")


def compare_sets(first: Path, second: Path) -> Iterator[Difference]:
    """Yield the tensors that differ, in the first set's order. Elements are compared by value; NaN equals NaN.

    The caller has verified both sets. Raises: CheckpointError. Cost: reads both once; memory: a few dozen MiB.
    """
    one, other = read_manifest(first), read_manifest(second)
    for kind in dict.fromkeys([*one.kinds, *other.kinds]):
        for name in dict.fromkeys([*one.tensors, *other.tensors]):
            shapes = [m.tensors.get(name) if kind in m.kinds else None for m in (one, other)]
            if shapes[0] is None or shapes[0] != shapes[1]:
                said = [f"is {list(shape)}" if shape else "is absent" for shape in shapes]
                yield Difference(kind, name, f"{said[0]} in the first, {said[1]} in the second")
                continue
            found = _compare(first, one, second, other, kind, name)
            if found.num_differing:
                yield found


def _compare(first: Path, one: Manifest, second: Path, other: Manifest, kind: str, name: str) -> Difference:
    """Compare a tensor chunk by chunk, and keep its worst element."""
    worst = Difference(kind, name, "", largest=-1.0, numel=whole(one.tensors[name]).numel)
    for box in chunks(whole(one.tensors[name])):
        a, b = (load_box(p, m, kind, name, box) for p, m in ((first, one), (second, other)))
        unlike = (a != b) & ~(np.isnan(a) & np.isnan(b))
        count = int(np.count_nonzero(unlike))
        if not count:
            continue
        worst = worst._replace(num_differing=worst.num_differing + count)
        apart = np.where(unlike, np.abs(a.astype(np.float64) - b), -1.0)
        place = int(np.argmax(np.nan_to_num(apart, nan=np.inf)))  # NaN against a number is worst
        if apart.flat[place] > worst.largest or np.isnan(apart.flat[place]):
            x, y = float(a.flat[place]), float(b.flat[place])
            inside = np.unravel_index(place, box.size)
            worst = worst._replace(largest=abs(x - y), relative=abs(x - y) / max(abs(x), abs(y)), first=x, second=y,
                                   at=tuple(int(i) + o for i, o in zip(inside, box.offset, strict=True)))
            if np.isnan(worst.largest):
                worst = worst._replace(largest=np.inf, relative=np.inf)
    return worst


def chunks(box: Box, limit: int = CHUNK_ELEMENTS) -> Iterator[Box]:
    """Cut a box along its longest dim until every part has at most `limit` elements."""
    if box.numel <= limit or max(box.size) == 1:
        yield box
        return
    dim = int(np.argmax(box.size))
    half = box.size[dim] // 2
    for start, size in ((0, half), (half, box.size[dim] - half)):
        offset = (*box.offset[:dim], box.offset[dim] + start, *box.offset[dim + 1 :])
        yield from chunks(Box(offset, (*box.size[:dim], size, *box.size[dim + 1 :])), limit)
