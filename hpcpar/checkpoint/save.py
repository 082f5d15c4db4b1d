"""Save a set: every rank writes its own boxes, rank 0 publishes all of them at once or nothing.

    all ranks   prepare        | write, sync     | agree |          | agree: published |
    rank 0      leftovers, tmp | model.h5 before |       | manifest | rename           | retention

`save_phases` is that sequence. It pauses (yields) wherever a rank's work goes on; who does the work is up to the
caller: the process itself (`save_set`), or a child beside it (`background`). A rank that fails says so in the next
agreement, so that all raise the same error and none waits for ever.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

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
    step_of,
)
from hpcpar.checkpoint.index import write_index
from hpcpar.checkpoint.publish import seal, take_name
from hpcpar.checkpoint.retention import retire
from hpcpar.checkpoint.store import Dataset, checksum_file, fill_file, sync_folder, write_file
from hpcpar.comm.control import Control
from hpcpar.errors import CheckpointError
from hpcpar.layout.buckets import Piece
from hpcpar.layout.layout import Layout

Array = np.ndarray[Any, Any]
Shards = Mapping[str, Sequence[Array]]
T = TypeVar("T")
_logger = logging.getLogger(__name__)


class Saving(NamedTuple):
    """How sets are saved, the same on all ranks: where, for which layout, and which older ones stay."""

    checkpoints: Path
    layout: Layout
    ranks_per_file: int = 1
    keep: int = 0
    keep_every: int = 0
    compression: str = "none"


class Published(NamedTuple):
    """A set that has just got its name."""

    path: Path
    num_bytes: int


class Worker(Protocol):
    """Who does a rank's share of a save, one task after the other: a method of `Tasks` by name."""

    def ask(self, task: str, **values: Any) -> None:
        """Begin a task; its values and its answer are what JSON can say."""
        ...

    def answer(self) -> Any:
        """Return the last task's answer, waiting for it if need be. Raises: whatever made it fail."""
        ...


def save_set(checkpoints: Path, step: int, layout: Layout, global_rank: int, control: Control, shards: Shards,
             state: Mapping[str, Any], ranks_per_file: int = 1, keep: int = 0, keep_every: int = 0,
             compression: str = "none") -> Path:
    """Write and publish the set of a step; return its folder. Every rank must call.

    `shards[kind][bucket]` is this rank's flat owned shard, [bucket.numel / num_shards], float32 or float64; the
    rank writes `layout.stored_pieces(global_rank)` of them. `state` goes into the manifest as JSON; rank 0's counts.
    `ranks_per_file` consecutive ranks share a file and write it in turn. A set of the same step is replaced; then
    older ones are deleted (`retention.retire`).
    Raises: CheckpointError, the same on all ranks, if any fails; older sets stay, nothing is left behind.
    Cost: own bytes written and synced once; ranks_per_file + 2 small all-gathers.
    """
    saving = Saving(checkpoints, layout, ranks_per_file, keep, keep_every, compression)
    return save_now(saving, step, global_rank, control, shards, state).path


def save_now(saving: Saving, step: int, global_rank: int, control: Control, shards: Shards,
             state: Mapping[str, Any]) -> Published:
    """Save a set from the first phase to the last, this process doing the work: what `save_set` does."""
    worker = InProcess(Tasks(saving, global_rank, shards))
    found = [published for published in save_phases(saving, step, state, control, worker) if published is not None]
    assert len(found) == 1  # gone through to the end: what follows the publication counts
    return found[0]


def save_phases(saving: Saving, step: int, state: Mapping[str, Any], control: Control,
                worker: Worker) -> Iterator[Published | None]:
    """Save a set, pausing while workers work: go on when every rank's worker is done (or wait for it in `answer`).

    Yields None at a pause, and once the set when it has just been published. Every rank must go through all of it.
    Raises: CheckpointError, the same on all ranks, if any fails.
    """
    final, folder = saving.checkpoints / set_name(step), saving.checkpoints / side_name(step, "tmp")
    alone = control.rank == 0

    def all_do(work: Callable[[], T]) -> list[T]:
        try:
            return together(control, set_name(step), work)
        except CheckpointError:
            if alone:  # all have answered: nobody writes there any more
                worker.ask("clear", folder=str(folder))
            raise

    all_do(lambda: _prepare(saving.checkpoints, folder) if alone else None)
    entries: list[FileEntry] = []
    for turn in range(saving.ranks_per_file):
        worker.ask("write", folder=str(folder), turn=turn, step=step)
        yield None
        answers = all_do(worker.answer)
        entries += [FileEntry(**entry) for answer in answers for entry in answer["entries"]]
    kinds = [answer["kinds"] for answer in answers]
    if alone:
        worker.ask("complete", folder=str(folder), step=step, kinds=kinds, state=dict(state),
                   entries=[_told(entry) for entry in entries])
    yield None

    def publish() -> None:
        worker.answer()
        take_name(folder, final)

    all_do(lambda: publish() if alone else None)
    if alone:
        worker.ask("settle", step=step)
    yield Published(final, sum(entry.size for entry in entries))
    if alone:
        try:
            worker.answer()  # the next save must not meet what is being deleted
        except Exception as error:  # published is published
            _logger.warning("%s: older sets could not be looked after: %s", final.name, error)


class Tasks:
    """A rank's share of a save, without communication; each method's name is a task, its values are plain."""

    def __init__(self, saving: Saving, global_rank: int, shards: Shards):
        self._saving, self._rank, self._shards = saving, global_rank, shards

    def write(self, folder: str, turn: int, step: int, index: bool = True) -> dict[str, Any]:
        """Write this rank's boxes if it is its turn; answer with the entries of files that it was the last to write.

        Rank 0 writes the `index` first: it needs no checksums, and is arithmetic while the disk is busy with others.
        """
        kinds = _kinds(self._shards)
        entries = []
        if index and self._rank == 0 and turn == 0:
            (Path(folder) / INDEX).unlink(missing_ok=True)  # of a worker that died here and was replaced
            entries.append(write_index(Path(folder), Manifest(step, kinds, self._tensors, self._files, {})))
        own = _write_own(Path(folder), self._saving, self._rank, self._shards, turn)
        return {"entries": [_told(entry) for entry in (*entries, own) if entry], "kinds": kinds}

    def complete(self, folder: str, step: int, kinds: list[dict[str, str]], state: dict[str, Any],
                 entries: list[dict[str, Any]]) -> None:
        """Add the manifest, and sync the folder: only its name is missing then."""
        unlike = [rank for rank, found in enumerate(kinds) if found != kinds[0]]
        if unlike:
            raise ValueError(f"rank {unlike[0]} has kinds {kinds[unlike[0]]}, rank 0 has {kinds[0]}")
        told = {entry["name"]: entry for entry in entries}
        files = [replace(file, **told[file.name]) for file in self._files]
        files += [FileEntry(**told[INDEX])] if INDEX in told else []
        (Path(folder) / MANIFEST).unlink(missing_ok=True)
        seal(Path(folder), Manifest(step, kinds[0], self._tensors, tuple(files), state,
                                    compression=self._saving.compression))

    @cached_property
    def _files(self) -> tuple[FileEntry, ...]:
        """The whole set's shard files without sizes and checksums; who writes what follows from the layout."""
        layout, ranks_per_file, found = self._saving.layout, self._saving.ranks_per_file, []
        for number, first in enumerate(range(0, layout.mesh.size, ranks_per_file)):
            members = range(first, min(first + ranks_per_file, layout.mesh.size))
            boxes = {rank: stored_boxes(layout, rank) for rank in members}
            if any(boxes.values()):
                found.append(FileEntry(shard_name(number), 0, "", tuple(rank for rank, own in boxes.items() if own),
                                       tuple(box for own in boxes.values() for box in own)))
        return tuple(found)

    @property
    def _tensors(self) -> dict[str, tuple[int, ...]]:
        return {p.name: p.shape for p in self._saving.layout.table}

    def settle(self, step: int) -> None:
        """Make the new name survive a power cut; only then delete what it replaces."""
        checkpoints = self._saving.checkpoints
        try:
            sync_folder(checkpoints)
        except OSError as error:
            _logger.warning("%s: its name may not survive a power cut: %s", set_name(step), error)
        shutil.rmtree(checkpoints / side_name(step, "old"), ignore_errors=True)
        retire(checkpoints, step, self._saving.keep, self._saving.keep_every)

    def clear(self, folder: str) -> None:
        """Delete what a failed save has written: on a full disk the next one needs the space."""
        shutil.rmtree(folder, ignore_errors=True)


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


def together(control: Control, name: str, work: Callable[[], T], verb: str = "save") -> list[T]:
    """Return every rank's result, or raise one CheckpointError on all if any rank's work raised."""
    result: T | None = None
    failed, cause = "", None
    try:
        result = work()
    except Exception as error:  # whatever it is: not to answer would leave the others waiting
        known = isinstance(error, CheckpointError)
        failed, cause = str(error) if known else f"{type(error).__name__}: {error}", error
    answers = control.all_gather((result, failed))
    failures = [(rank, why) for rank, (_, why) in enumerate(answers) if why]
    if failures:
        rank, why = failures[0]
        more = f" (and {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
        raise CheckpointError(f"cannot {verb} {name}: rank {rank}{more}: {why}; older sets are untouched") from cause
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
            left.rename(checkpoints / name)  # killed between the two renames of take_name
        elif what in ("tmp", "old", "gone"):
            shutil.rmtree(left)
    folder.mkdir()
    sync_folder(checkpoints)


def _told(entry: FileEntry) -> dict[str, Any]:
    """Return what only the writer knows of a file."""
    return {"name": entry.name, "size": entry.size, "checksum": entry.checksum, "start": entry.start}


def _kinds(shards: Shards) -> dict[str, str]:
    """Return each kind's dtype, in the order that places values in a file: the same on all ranks."""
    return {kind: str(shards[kind][0].dtype) for kind in sorted(shards, key=lambda kind: (kind != WEIGHT, kind))}


def _write_own(folder: Path, saving: Saving, global_rank: int, shards: Shards, turn: int) -> FileEntry | None:
    """Write this rank's boxes if it is its turn; return the file's entry if this rank was the last to write it."""
    layout, ranks_per_file = saving.layout, saving.ranks_per_file
    number, place = divmod(global_rank, ranks_per_file)
    if place != turn:
        return None
    pieces = layout.stored_pieces(global_rank)
    members = range(number * ranks_per_file, min((number + 1) * ranks_per_file, layout.mesh.size))
    plan = {rank: stored_boxes(layout, rank) if rank != global_rank else _boxes(pieces) for rank in members}
    writers = [rank for rank, boxes in plan.items() if boxes]
    if global_rank not in writers:
        return None
    arrays = _cut(layout, global_rank, pieces, shards)
    path = folder / shard_name(number)
    datasets = [Dataset(dataset_path(kind, name, box), box.size, dtype, box.offset)
                for kind, dtype in _kinds(shards).items() for boxes in plan.values() for name, box in boxes]
    if global_rank == writers[0]:
        path.unlink(missing_ok=True)  # of a worker that died here and was replaced
        entry = write_file(path, datasets, arrays, saving.compression)
        start = entry.start
    else:
        start = fill_file(path, datasets, arrays)
    if global_rank != writers[-1]:
        return None
    # the others' bytes are only on disk: the last writer reads them back
    return entry if len(writers) == 1 else replace(checksum_file(path), start=start)


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
