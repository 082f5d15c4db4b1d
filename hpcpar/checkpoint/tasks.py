"""A rank's share of a save, without communication: its boxes into its file; on rank 0 the index, the manifest too.

What is the same at every save (who writes what, the files without their values) is made at the first one and kept.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from hpcpar.checkpoint.format import (
    INDEX,
    MANIFEST,
    WEIGHT,
    FileEntry,
    Manifest,
    StoredBox,
    dataset_path,
    set_name,
    shard_name,
    side_name,
)
from hpcpar.checkpoint.index import index_image, write_index
from hpcpar.checkpoint.publish import seal
from hpcpar.checkpoint.retention import retire
from hpcpar.checkpoint.store import Dataset, checksum_file, fill_file, lay_out, sync_folder, write_file
from hpcpar.layout.buckets import Piece
from hpcpar.layout.layout import Layout

Array = np.ndarray[Any, Any]
Shards = Mapping[str, Sequence[Array]]
_logger = logging.getLogger(__name__)


class Saving(NamedTuple):
    """How sets are saved, the same on all ranks: where, for which layout, and which older ones stay."""

    checkpoints: Path
    layout: Layout
    ranks_per_file: int = 1
    keep: int = 0
    keep_every: int = 0
    compression: str = "none"


class Worker(Protocol):
    """Who does a rank's share of a save, one task after the other: a method of `Tasks` by name."""

    def ask(self, task: str, **values: Any) -> None:
        """Begin a task; its values and its answer are what JSON can say."""
        ...

    def answer(self) -> Any:
        """Return the last task's answer, waiting for it if need be. Raises: whatever made it fail."""
        ...


class Tasks:
    """Each method's name is a task, its values are plain. `shards` may be others of the same shapes at every save."""

    def __init__(self, saving: Saving, global_rank: int, shards: Shards):
        self.saving, self.shards = saving, shards
        self._rank = global_rank
        # by their arguments: shards may come with another dtype
        self._lay_out = lru_cache(maxsize=1)(lay_out)
        self._index_image = lru_cache(maxsize=1)(self._make_index_image)

    def write(self, folder: str, turn: int, step: int, index: bool = True) -> dict[str, Any]:
        """Write this rank's boxes if it is its turn; answer with the entries of files that it was the last to write.

        Rank 0 writes the `index` first: it needs no checksums, and is arithmetic while the disk is busy with others.
        """
        kinds = _kinds(self.shards)
        entries = []
        if index and self._rank == 0 and turn == 0:
            (Path(folder) / INDEX).unlink(missing_ok=True)  # of a worker that died here and was replaced
            entries.append(write_index(Path(folder), self._index_image(tuple(kinds.items())), step))
        if self._rank % self.saving.ranks_per_file == turn:
            entries += self._write_own(Path(folder), kinds)
        return {"entries": [told(entry) for entry in entries], "kinds": kinds}

    def complete(self, folder: str, step: int, kinds: list[dict[str, str]], state: dict[str, Any],
                 entries: list[dict[str, Any]]) -> None:
        """Add the manifest, and sync the folder: only its name is missing then."""
        unlike = [rank for rank, found in enumerate(kinds) if found != kinds[0]]
        if unlike:
            raise ValueError(f"rank {unlike[0]} has kinds {kinds[unlike[0]]}, rank 0 has {kinds[0]}")
        written = {entry["name"]: entry for entry in entries}
        files = [replace(file, **written[file.name]) for file in self._files]
        files += [FileEntry(**written[INDEX])] if INDEX in written else []
        (Path(folder) / MANIFEST).unlink(missing_ok=True)
        seal(Path(folder), Manifest(step, kinds[0], self._tensors, tuple(files), state,
                                    compression=self.saving.compression))

    def settle(self, step: int) -> None:
        """Make the new name survive a power cut; only then delete what it replaces."""
        checkpoints = self.saving.checkpoints
        try:
            sync_folder(checkpoints)
        except OSError as error:
            _logger.warning("%s: its name may not survive a power cut: %s", set_name(step), error)
        shutil.rmtree(checkpoints / side_name(step, "old"), ignore_errors=True)
        retire(checkpoints, step, self.saving.keep, self.saving.keep_every)

    def clear(self, folder: str) -> None:
        """Delete what a failed save has written: on a full disk the next one needs the space."""
        shutil.rmtree(folder, ignore_errors=True)

    @cached_property
    def _files(self) -> tuple[FileEntry, ...]:
        """The whole set's shard files without sizes and checksums; who writes what follows from the layout."""
        by_file = map(self._boxes_in, range(-(-self.saving.layout.mesh.size // self.saving.ranks_per_file)))
        return tuple(FileEntry(shard_name(number), 0, "", tuple(boxes), tuple(itertools.chain(*boxes.values())))
                     for number, boxes in enumerate(by_file) if boxes)

    @cached_property
    def _tensors(self) -> dict[str, tuple[int, ...]]:
        return {p.name: p.shape for p in self.saving.layout.table}

    @cached_property
    def _pieces(self) -> list[Piece]:
        return self.saving.layout.stored_pieces(self._rank)

    @cached_property
    def _own_file(self) -> dict[int, tuple[StoredBox, ...]]:
        return self._boxes_in(self._rank // self.saving.ranks_per_file)

    def _boxes_in(self, number: int) -> dict[int, tuple[StoredBox, ...]]:
        """Return the boxes in a file by writer, in the order in which they write."""
        layout, ranks_per_file = self.saving.layout, self.saving.ranks_per_file
        ranks = range(number * ranks_per_file, min((number + 1) * ranks_per_file, layout.mesh.size))
        return {rank: boxes for rank in ranks if (boxes := stored_boxes(layout, rank))}

    def _make_index_image(self, kinds: tuple[tuple[str, str], ...]) -> bytes:
        return index_image(Manifest(0, dict(kinds), self._tensors, self._files, {}))

    def _write_own(self, folder: Path, kinds: Mapping[str, str]) -> list[FileEntry]:
        """Write this rank's boxes; return the file's entry if this rank was the last to write it."""
        writers = list(self._own_file)
        if self._rank not in writers:
            return []
        path = folder / shard_name(self._rank // self.saving.ranks_per_file)
        arrays = self._cut()
        datasets = [Dataset(dataset_path(kind, name, box), box.size, dtype, box.offset)
                    for kind, dtype in kinds.items() for boxes in self._own_file.values() for name, box in boxes]
        if self._rank == writers[0]:
            path.unlink(missing_ok=True)  # of a worker that died here and was replaced
            entry = write_file(path, datasets, arrays, self.saving.compression, self._lay_out)
            start = entry.start
        else:
            start = fill_file(path, datasets, arrays)
        if self._rank != writers[-1]:
            return []
        # the others' bytes are only on disk: the last writer reads them back
        return [entry if len(writers) == 1 else replace(checksum_file(path), start=start)]

    def _cut(self) -> dict[str, Array]:
        """View the boxes inside the flat shards, without a copy, by dataset path."""
        layout = self.saving.layout
        at = layout.mesh.coordinates(self._rank)
        sizes = [bucket.numel // layout.num_shards for bucket in layout.buckets(at.pp_rank, at.tp_rank)]
        for kind, flats in self.shards.items():
            if [flat.shape for flat in flats] != [(size,) for size in sizes] or len({flat.dtype for flat in flats}) > 1:
                raise ValueError(f"shards of {kind} are {[(f.shape, str(f.dtype)) for f in flats][:4]}..., "
                                 f"the layout's buckets want {sizes[:4]}... elements of one dtype")
        return {dataset_path(kind, p.parameter.name, p.box): flats[p.bucket][p.start : p.start + p.box.numel]
                for kind, flats in self.shards.items() for p in self._pieces}


class InProcess:
    """The process itself as its worker: a task is done when it is asked for."""

    def __init__(self, tasks: Tasks):
        self._tasks = tasks
        self._answer: Any = None
        self._error: Exception | None = None

    def ask(self, task: str, **values: Any) -> None:
        """Do a task."""
        self._answer, self._error = None, None
        try:
            self._answer = getattr(self._tasks, task)(**values)
        except Exception as error:  # told in the next agreement: the others wait there
            self._error = error

    def answer(self) -> Any:
        """Return its answer, or raise what it raised."""
        if self._error is not None:
            raise self._error
        return self._answer


def stored_boxes(layout: Layout, global_rank: int) -> tuple[StoredBox, ...]:
    """List the boxes that a rank writes."""
    return tuple(StoredBox(p.parameter.name, p.box) for p in layout.stored_pieces(global_rank))


def told(entry: FileEntry) -> dict[str, Any]:
    """Return what only the writer knows of a file."""
    return {"name": entry.name, "size": entry.size, "checksum": entry.checksum, "start": entry.start}


def _kinds(shards: Shards) -> dict[str, str]:
    """Return each kind's dtype, in the order that places values in a file: the same on all ranks."""
    return {kind: str(shards[kind][0].dtype) for kind in sorted(shards, key=lambda kind: (kind != WEIGHT, kind))}
