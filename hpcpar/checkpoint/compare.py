"""Compare two sets element by element, whatever layouts wrote them, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpcpar.checkpoint.format import read_manifest
from hpcpar.checkpoint.load import Array, load_box
from hpcpar.layout.boxes import Box, whole

CHUNK_ELEMENTS = 1 << 20  # of every kind of both sets in memory at once


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
    """Yield what differs, tensor by tensor in the first set's order. Elements compare by value; NaN equals NaN.

    The caller has verified both sets. Raises: CheckpointError. Cost: reads both once; memory: a few dozen MiB.
    """
    one, other = read_manifest(first), read_manifest(second)
    for name in dict.fromkeys([*one.tensors, *other.tensors]):
        worst = {}
        for kind in dict.fromkeys([*one.kinds, *other.kinds]):
            shapes = [m.tensors.get(name) if kind in m.kinds else None for m in (one, other)]
            if shapes[0] is None or shapes[0] != shapes[1]:
                said = [f"is {list(shape)}" if shape is not None else "is absent" for shape in shapes]
                yield Difference(kind, name, f"{said[0]} in the first, {said[1]} in the second")
            else:
                worst[kind] = Difference(kind, name, "", numel=math.prod(shapes[0]))
        for box in chunks(whole(one.tensors[name])) if worst else ():
            a, b = (load_box(path, m, name, box, worst) for path, m in ((first, one), (second, other)))
            for kind, found in worst.items():
                worst[kind] = _worse(found, a[kind], b[kind], box)
        yield from (found for found in worst.values() if found.num_differing)


def _worse(found: Difference, a: Array, b: Array, box: Box) -> Difference:
    """Add a chunk to a tensor's difference, and keep its worst element; NaN against a number is worst of all."""
    unlike = (a != b) & ~(np.isnan(a) & np.isnan(b))
    count = int(np.count_nonzero(unlike))
    if not count:
        return found
    apart = np.where(unlike, np.nan_to_num(np.abs(a.astype(np.float64) - b), nan=np.inf), -1.0)
    place, before = int(np.argmax(apart)), found.num_differing
    found = found._replace(num_differing=before + count)
    if before and apart.flat[place] <= found.largest:
        return found
    x, y = float(a.flat[place]), float(b.flat[place])
    largest, size = float(apart.flat[place]), max(abs(x), abs(y))
    at = tuple(int(i) + o for i, o in zip(np.unravel_index(place, box.size), box.offset, strict=True))
    return found._replace(largest=largest, relative=math.inf if math.isinf(largest) else largest / size, at=at,
                          first=x, second=y)


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
