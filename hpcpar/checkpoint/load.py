"""Load a set into any layout: intersect the boxes wanted with the boxes stored, read only those hyperslabs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcpar.checkpoint.format import WEIGHT, Manifest, dataset_path, read_manifest
from hpcpar.checkpoint.store import open_hdf5
from hpcpar.checkpoint.verify import verify_set
from hpcpar.errors import CheckpointError, did_you_mean
from hpcpar.layout.boxes import Box, whole
from hpcpar.layout.layout import Layout
from hpcpar.units import format_bytes

Array = np.ndarray[Any, Any]
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """A box to be read, and where to: an array of the box's shape for every kind."""

    tensor: str
    box: Box
    into: Mapping[str, Array]


@dataclass(frozen=True)
class Read:
    """The part of one stored box that goes into one wanted box."""

    stored: Box
    common: Box
    wanted: Wanted


def load_shards(path: Path, layout: Layout, global_rank: int, dtype: np.dtype[Any] | type | str,
                verify: bool = True) -> dict[str, list[Array]]:
    """Return a rank's flat owned shards under `layout`, whatever layout saved them: shards[kind][bucket], `dtype`.

    Padding is zero. The files read are verified first, unless `verify` is off because `verify_together` has done so.
    Raises: CheckpointError naming the tensor if one is missing, extra, of another shape, or not covered exactly.
    Cost: reads the rank's own bytes (logged), each file opened once; memory: the shards and a MiB.
    """
    manifest = read_manifest(path)
    check_tensors(manifest, layout, path)
    at = layout.mesh.coordinates(global_rank)
    buckets = layout.buckets(at.pp_rank, at.tp_rank)
    shards = {kind: [np.zeros(bucket.numel // layout.num_shards, dtype) for bucket in buckets]
              for kind in manifest.kinds}
    wanted = [Wanted(p.parameter.name, p.box,
                     {kind: flats[p.bucket][p.start : p.start + p.box.numel].reshape(p.box.size)
                      for kind, flats in shards.items()}) for p in layout.held_pieces(global_rank)]
    _fill(path, manifest, wanted, verify)
    return shards


def load_tensor(path: Path, name: str, kind: str = WEIGHT, verify: bool = True) -> Array:
    """Return one logical tensor whole, in the dtype it was stored in. Raises: CheckpointError."""
    manifest = read_manifest(path)
    for word, known in ((name, manifest.tensors), (kind, manifest.kinds)):
        if word not in known:
            raise CheckpointError(f"{path}: has no {word}; {did_you_mean(word, known)}")
    array = np.zeros(manifest.tensors[name], manifest.kinds[kind])
    _fill(path, manifest, [Wanted(name, whole(array.shape), {kind: array})], verify)
    return array


def load_kinds(path: Path, manifest: Manifest, tensor: str, box: Box, kinds: Iterable[str]) -> dict[str, Array]:
    """Return a part of a logical tensor, by kind, from a set that the caller has verified. Raises: CheckpointError."""
    arrays = {kind: np.zeros(box.size, manifest.kinds[kind]) for kind in kinds}
    _fill(path, manifest, [Wanted(tensor, box, arrays)], verify=False)
    return arrays


def check_tensors(manifest: Manifest, layout: Layout, path: Path) -> None:
    """Raise CheckpointError unless the set has exactly the model's tensors, with their shapes."""
    model = {p.name: p.shape for p in layout.table}
    wrong = [f"{n} is missing" for n in model if n not in manifest.tensors]
    wrong += [f"{n} is not in the model" for n in manifest.tensors if n not in model]
    wrong += [f"{n} is {list(manifest.tensors[n])}, the model wants {list(shape)}" for n, shape in model.items()
              if n in manifest.tensors and manifest.tensors[n] != shape]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"{path}: does not fit the model: {'; '.join(wrong[:5])}{more}")


def plan_reads(manifest: Manifest, wanted: Sequence[Wanted]) -> dict[str, list[Read]]:
    """Return, by file, what has to be read. Raises: CheckpointError if a wanted box is not covered exactly.

    Cost: the boxes wanted times the stored boxes of the same tensor.
    """
    names = {want.tensor for want in wanted}
    sources: dict[str, list[tuple[str, Box]]] = {name: [] for name in names}
    for file in manifest.files:
        for tensor, box in file.boxes:
            if tensor in names:
                sources[tensor].append((file.name, box))
    plan: dict[str, list[Read]] = {}
    for want in wanted:
        found = [(file, Read(box, common, want)) for file, box in sources[want.tensor]
                 if (common := box.intersect(want.box)) is not None]
        _check_cover(want, [read.common for _, read in found])
        for file_name, read in found:
            plan.setdefault(file_name, []).append(read)
    return plan


def _check_cover(want: Wanted, parts: list[Box]) -> None:
    """Parts that lie inside, do not overlap and sum up to the whole leave no gap."""
    missing = want.box.numel - sum(part.numel for part in parts)
    low = np.array([part.offset for part in parts]).reshape(len(parts), -1)
    high = np.array([part.end for part in parts]).reshape(len(parts), -1)
    overlap = any(((low[i] < high[i + 1 :]) & (low[i + 1 :] < high[i])).all(axis=1).any()
                  for i in range(len(parts) - 1))
    if missing or overlap:
        what = "boxes that overlap" if overlap else f"{missing} elements that were never written"
        raise CheckpointError(f"{want.tensor}: its part {list(want.box.offset)}+{list(want.box.size)} has {what}")


def _fill(path: Path, manifest: Manifest, wanted: Sequence[Wanted], verify: bool) -> None:
    """Read every wanted box, and log how much that took."""
    plan = plan_reads(manifest, wanted)
    if verify:
        verify_set(path, plan)
    num_bytes = sum(_read_file(path / name, manifest, reads) for name, reads in plan.items())
    own = sum(np.dtype(manifest.kinds[kind]).itemsize * array.size for want in wanted
              for kind, array in want.into.items())
    _logger.info("read %s (%.2f of the %s wanted) from %d files of %s", format_bytes(num_bytes),
                 num_bytes / max(1, own), format_bytes(own), len(plan), path.name)


def _read_file(path: Path, manifest: Manifest, reads: Iterable[Read]) -> int:
    """Read one file's hyperslabs into place; return the bytes."""
    num_bytes, name = 0, ""
    try:
        with open_hdf5(path) as file:
            for read in reads:
                for kind, array in read.wanted.into.items():
                    name = dataset_path(kind, read.wanted.tensor, read.stored)
                    stored = file[name]
                    if stored.shape != read.stored.size or stored.dtype != manifest.kinds[kind]:
                        raise CheckpointError(f"{path}: {name} is {stored.dtype} {stored.shape}, the manifest says "
                                              f"{manifest.kinds[kind]} {read.stored.size}")
                    stored.read_direct(array, read.common.slices(read.stored), read.common.slices(read.wanted.box))
                    num_bytes += read.common.numel * stored.dtype.itemsize
    except (OSError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {name}: {error}") from error
    return num_bytes
