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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from hpcpar.checkpoint.format import FileEntry, set_name, side_name, step_of
from hpcpar.checkpoint.publish import take_name
from hpcpar.checkpoint.store import sync_folder
from hpcpar.checkpoint.tasks import InProcess, Saving, Shards, Tasks, Worker, told
from hpcpar.comm.control import Control
from hpcpar.errors import CheckpointError
from hpcpar.layout.layout import Layout

T = TypeVar("T")
_logger = logging.getLogger(__name__)


class Published(NamedTuple):
    """A set that has just got its name."""

    path: Path
    num_bytes: int


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
    return save_now(Tasks(saving, global_rank, shards), step, control, state).path


def save_now(tasks: Tasks, step: int, control: Control, state: Mapping[str, Any]) -> Published:
    """Do a save's tasks from the first phase to the last in this process: what `save_set` does.

    A caller that saves again keeps the same `tasks`: what does not change between saves is then made once.
    """
    phases = save_phases(tasks.saving, step, state, control, InProcess(tasks))
    found = [published for published in phases if published is not None]
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
                   entries=[told(entry) for entry in entries])
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
