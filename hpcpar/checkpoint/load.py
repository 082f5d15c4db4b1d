"""Load a set into any layout: intersect the boxes wanted with the boxes stored, read only those hyperslabs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpcpar.checkpoint.format import BFLOAT16, WEIGHT, Manifest, bits_of, read_manifest
from hpcpar.checkpoint.read import Read, Wanted, ask_ahead, read_verified, read_wanted
from hpcpar.comm.control import Control
from hpcpar.errors import CheckpointError, HpcparError, did_you_mean
from hpcpar.layout.boxes import Box, whole
from hpcpar.layout.layout import Layout
from hpcpar.units import format_bytes

Array = np.ndarray[Any, Any]
_logger = logging.getLogger(__name__)


def load_shards(path: Path, layout: Layout, global_rank: int, dtype: np.dtype[Any] | type | str,
                verify: bool = True) -> dict[str, list[Array]]:
    """Return a rank's flat owned shards under `layout`, whatever layout saved them: shards[kind][bucket], `dtype`.

    Padding is zero. The files are verified while they are read, unless `verify` is off because that is done.
    Raises: CheckpointError naming the tensor if one is missing, extra, of another shape, or not covered exactly.
    Cost: reads whole files, or with `verify` off the rank's own bytes (logged); memory: the shards and a few MiB.
    """
    manifest = read_manifest(path)
    shards, wanted = _empty_shards(path, manifest, layout, global_rank, dtype)
    _fill(path, manifest, wanted, verify)
    return shards


def load_together(path: Path, layout: Layout, control: Control,
                  dtype: np.dtype[Any] | type | str) -> dict[str, list[Array]]:
    """Return every rank's shards as `load_shards` does, and verify the whole set. Every rank must call.

    Each rank verifies a share of the files, those that it reads whole under the layout that saved them: then every
    byte is read once. Raises: CheckpointError, the same on all ranks, with every bad file and the tensors in it.
    """
    shards: dict[str, list[Array]] = {}
    why = ""
    try:
        manifest = read_manifest(path)
        share = share_of(manifest, control.rank, control.size)
        for name in share:
            ask_ahead(path / name)
        shards, wanted = _empty_shards(path, manifest, layout, control.rank, dtype)
        _fill(path, manifest, wanted, share)
    except HpcparError as error:  # whatever it is: not to answer would leave the others waiting
        why = str(error)
    reasons = sorted({reason for reason in control.all_gather(why) if reason})
    if reasons:
        raise CheckpointError("; ".join(reasons))
    return shards


def share_of(manifest: Manifest, rank: int, num_ranks: int) -> set[str]:
    """Name the files that a rank verifies: file n is that of rank n, or of the first of the ranks that wrote it."""
    names = [file.name for file in manifest.files if file.boxes]
    few = len(names) < num_ranks
    mine = {name for n, name in enumerate(names)
            if (n * num_ranks // len(names) if few else n % num_ranks) == rank}
    return mine | ({file.name for file in manifest.files if not file.boxes} if rank == 0 else set())


def names_needed(manifest: Manifest, layout: Layout, rank: int, num_ranks: int) -> set[str]:
    """Name the files that `load_together` opens on a rank. Raises: CheckpointError if the boxes are not all there."""
    wanted = [Wanted(p.parameter.name, p.box, {}) for p in layout.held_pieces(rank)]
    return set(plan_reads(manifest, wanted)) | share_of(manifest, rank, num_ranks)


def _empty_shards(path: Path, manifest: Manifest, layout: Layout, global_rank: int,
                  dtype: np.dtype[Any] | type | str) -> tuple[dict[str, list[Array]], list[Wanted]]:
    """Make a rank's shards, and list what goes where in them."""
    check_tensors(manifest, layout, path)
    at = layout.mesh.coordinates(global_rank)
    buckets = layout.buckets(at.pp_rank, at.tp_rank)
    shards = {kind: [np.zeros(bucket.numel // layout.num_shards, dtype) for bucket in buckets]
              for kind in manifest.kinds}
    wanted = [Wanted(p.parameter.name, p.box,
                     {kind: flats[p.bucket][p.start : p.start + p.box.numel].reshape(p.box.size)
                      for kind, flats in shards.items()}) for p in layout.held_pieces(global_rank)]
    return shards, wanted


def load_tensor(path: Path, name: str, kind: str = WEIGHT, verify: bool = True) -> Array:
    """Return one logical tensor whole, in its stored dtype (bfloat16: as float32). Raises: CheckpointError."""
    manifest = read_manifest(path)
    for word, known in ((name, manifest.tensors), (kind, manifest.kinds)):
        if word not in known:
            raise CheckpointError(f"{path}: has no {word}; {did_you_mean(word, known)}")
    return load_box(path, manifest, name, whole(manifest.tensors[name]), [kind], verify)[kind]


def load_box(path: Path, manifest: Manifest, tensor: str, box: Box, kinds: Iterable[str],
             verify: bool = False) -> dict[str, Array]:
    """Return a part of a logical tensor, by kind (bfloat16: as float32). Raises: CheckpointError.

    Without `verify` the caller has verified the set.
    """
    dtypes = {kind: manifest.dtype(kind, tensor) for kind in kinds}
    arrays = {kind: np.zeros(box.size, "float32" if dtype == BFLOAT16 else dtype) for kind, dtype in dtypes.items()}
    _fill(path, manifest, [Wanted(tensor, box, arrays)], verify)
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


def _fill(path: Path, manifest: Manifest, wanted: Sequence[Wanted], verify: bool | set[str]) -> None:
    """Read every wanted box, verify what is read (or the files named), and log how much that took."""
    plan = plan_reads(manifest, wanted)
    checked = set(plan) if verify is True else verify or set()
    num_bytes, bad = 0, []
    # first what no other rank verifies: each file is fetched by one rank, and lies in the page cache for the others
    for entry in sorted(manifest.files, key=lambda entry: entry.name not in checked):
        if entry.name in checked or entry.name in plan:
            read = read_verified if entry.name in checked else read_wanted
            try:
                num_bytes += read(path, manifest, entry, plan.get(entry.name, []))
            except CheckpointError as error:
                bad.append(str(error))
    if bad:
        raise CheckpointError("; ".join(bad))
    own = sum(bits_of(manifest.dtype(kind, want.tensor)).itemsize * array.size for want in wanted
              for kind, array in want.into.items())
    _logger.info("read %s (%.2f of the %s wanted) from %d files of %s", format_bytes(num_bytes),
                 num_bytes / max(1, own), format_bytes(own), len(plan), path.name)
