"""Save a set: every rank writes its own boxes, rank 0 publishes all of them at once or nothing.

    all ranks   plan (no communication) | write, sync | agree |                                  | agree
    rank 0      clear leftovers, .tmp   |             |       | model.h5, manifest, sync, rename |       | retention

A rank that fails says so in the next agreement, so that all raise the same error and none waits for ever.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hpcpar.checkpoint.format import (
    MANIFEST,
    FileEntry,
    Manifest,
    StoredBox,
    dataset_path,
    set_name,
    shard_name,
    side_name,
    step_of,
)
from hpcpar.checkpoint.index import write_index
from hpcpar.checkpoint.store import Dataset, checksum_file, fill_file, sync_folder, write_bytes, write_file
from hpcpar.checkpoint.verify import published_sets
from hpcpar.comm.control import Control
from hpcpar.errors import CheckpointError
from hpcpar.layout.buckets import Piece
from hpcpar.layout.layout import Layout

Array = np.ndarray[Any, Any]
Shards = Mapping[str, Sequence[Array]]
T = TypeVar("T")
_logger = logging.getLogger(__name__)


def save_set(checkpoints: Path, step: int, layout: Layout, global_rank: int, control: Control, shards: Shards,
             state: Mapping[str, Any], ranks_per_file: int = 1, keep: int = 0) -> Path:
    """Write and publish the set of a step; return its folder. Every rank must call.

    `shards[kind][bucket]` is this rank's flat owned shard, [bucket.numel / num_shards], float32 or float64; the
    rank writes `layout.stored_pieces(global_rank)` of them. `state` goes into the manifest as JSON; rank 0's counts.
    `ranks_per_file` consecutive ranks share a file and write it in turn. A set of the same step is replaced; then
    all but the newest `keep` sets up to this step are deleted (0: none).
    Raises: CheckpointError, the same on all ranks, if any fails; older sets stay, nothing is left behind.
    Cost: own bytes written and synced once; ranks_per_file + 2 small all-gathers.
    """
    final, folder = checkpoints / set_name(step), checkpoints / side_name(step, "tmp")
    alone = control.rank == 0
    _together(control, folder, lambda: _prepare(checkpoints, folder) if alone else None)
    entries: list[FileEntry] = []
    for turn in range(ranks_per_file):
        answers = _together(control, folder, partial(_write_own, folder, layout, global_rank, shards, ranks_per_file,
                                                     turn))
        entries += [entry for entry, _ in answers if entry is not None]
    kinds = {rank: found for rank, (_, found) in enumerate(answers)}

    def publish() -> None:
        unlike = [rank for rank, found in kinds.items() if found != kinds[0]]
        if unlike:
            raise ValueError(f"rank {unlike[0]} has kinds {kinds[unlike[0]]}, rank 0 has {kinds[0]}")
        _publish(folder, final, _manifest(step, layout, ranks_per_file, kinds[0], entries, state))

    _together(control, folder, lambda: publish() if alone else None)
    if alone and keep:
        _retire(checkpoints, step, keep)
    return final


def stored_boxes(layout: Layout, global_rank: int) -> tuple[StoredBox, ...]:
    """List the boxes that a rank writes."""
    return tuple(StoredBox(p.parameter.name, p.box) for p in layout.stored_pieces(global_rank))


def _together(control: Control, folder: Path, work: Callable[[], T]) -> list[T]:
    """Return every rank's result, or raise one CheckpointError on all if any rank's work raised."""
    result: T | None = None
    failed, cause = "", None
    try:
        result = work()
    except Exception as error:  # whatever it is: not to answer would leave the others waiting
        failed, cause = f"{type(error).__name__}: {error}", error
    answers = control.all_gather((result, failed))
    failures = [(rank, why) for rank, (_, why) in enumerate(answers) if why]
    if failures:
        if control.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        rank, why = failures[0]
        more = f" (and {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
        raise CheckpointError(f"cannot save {folder.name[1:-4]}: rank {rank}{more}: {why}; older sets are untouched"
                              ) from cause
    results: list[T] = [result for result, _ in answers]
    return results


def _prepare(checkpoints: Path, folder: Path) -> None:
    """Clear what dead runs left behind, and make the folder to write in."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    for left in checkpoints.glob(".step-*.*"):
        name, what = left.name[1:].rsplit(".", 1)
        if step_of(name) is None:
            continue
        if what == "old" and not (checkpoints / name).exists():
            left.rename(checkpoints / name)  # killed between the two renames of _publish
        elif what in ("tmp", "old", "gone"):
            shutil.rmtree(left)
    folder.mkdir()
    sync_folder(checkpoints)


def _write_own(folder: Path, layout: Layout, global_rank: int, shards: Shards, ranks_per_file: int,
               turn: int) -> tuple[FileEntry | None, dict[str, str]]:
    """Write this rank's boxes if it is its turn; return the file's entry if this rank was the last to write it."""
    kinds = {kind: str(buckets[0].dtype) for kind, buckets in sorted(shards.items())}
    number, place = divmod(global_rank, ranks_per_file)
    if place != turn:
        return None, kinds
    pieces = layout.stored_pieces(global_rank)
    members = range(number * ranks_per_file, min((number + 1) * ranks_per_file, layout.mesh.size))
    plan = {rank: stored_boxes(layout, rank) if rank != global_rank else _boxes(pieces) for rank in members}
    writers = [rank for rank, boxes in plan.items() if boxes]
    if global_rank not in writers:
        return None, kinds
    arrays = _cut(layout, global_rank, pieces, shards)
    path = folder / shard_name(number)
    datasets = [Dataset(dataset_path(kind, name, box), box.size, dtype, box.offset)
                for kind, dtype in kinds.items() for boxes in plan.values() for name, box in boxes]
    if global_rank == writers[0]:
        entry = write_file(path, datasets, arrays)
        start = entry.start
    else:
        start = fill_file(path, datasets, arrays)
    if global_rank != writers[-1]:
        return None, kinds
    # the others' bytes are only on disk: the last writer reads them back
    return entry if len(writers) == 1 else replace(checksum_file(path), start=start), kinds


def _boxes(pieces: list[Piece]) -> tuple[StoredBox, ...]:
    return tuple(StoredBox(p.parameter.name, p.box) for p in pieces)


def _cut(layout: Layout, global_rank: int, pieces: list[Piece], shards: Shards) -> dict[str, Array]:
    """View the boxes inside the flat shards, without a copy, by dataset path."""
    at = layout.mesh.coordinates(global_rank)
    sizes = [bucket.numel // layout.num_shards for bucket in layout.buckets(at.pp_rank, at.tp_rank)]
    for kind, flats in shards.items():
        if [flat.shape for flat in flats] != [(size,) for size in sizes] or len({flat.dtype for flat in flats}) > 1:
            raise ValueError(f"shards of {kind} are {[(f.shape, str(f.dtype)) for f in flats][:4]}..., the layout's "
                             f"buckets want {sizes[:4]}... elements of one dtype")
    return {dataset_path(kind, p.parameter.name, p.box): flats[p.bucket][p.start : p.start + p.box.numel]
            for kind, flats in shards.items() for p in pieces}


def _manifest(step: int, layout: Layout, ranks_per_file: int, kinds: Mapping[str, str], entries: list[FileEntry],
              state: Mapping[str, Any]) -> Manifest:
    """List the whole set; who wrote what follows from the layout."""
    size, files = layout.mesh.size, []
    by_name = {entry.name: entry for entry in entries}
    for number, first in enumerate(range(0, size, ranks_per_file)):
        boxes = {rank: stored_boxes(layout, rank) for rank in range(first, min(first + ranks_per_file, size))}
        writers = tuple(rank for rank, found in boxes.items() if found)
        if writers:
            files.append(replace(by_name[shard_name(number)], ranks=writers,
                                 boxes=tuple(box for found in boxes.values() for box in found)))
    return Manifest(step, kinds, {p.name: p.shape for p in layout.table}, tuple(files), state)


def _publish(folder: Path, final: Path, manifest: Manifest) -> None:
    """Complete the folder and give it its name; a kill at any point leaves this set or the one before published."""
    index = write_index(folder, manifest)
    write_bytes(folder / MANIFEST, replace(manifest, files=(*manifest.files, index)).to_bytes())
    sync_folder(folder)
    aside = final.with_name(side_name(manifest.step, "old"))
    if final.exists():
        final.rename(aside)  # `published_sets` still counts it, until the new one has the name
    try:
        folder.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _retire(checkpoints: Path, step: int, keep: int) -> None:
    """Delete all but the newest `keep` sets up to `step`; the one just published is among those that stay."""
    steps = [int(s) for p in published_sets(checkpoints) if (s := step_of(p.name)) is not None and s <= step]
    for old in steps[:-keep]:
        gone = checkpoints / side_name(old, "gone")
        try:
            (checkpoints / set_name(old)).rename(gone)  # so that a kill leaves no published half
            shutil.rmtree(gone)
        except OSError as error:
            _logger.warning("old set %s could not be deleted: %s", set_name(old), error)
