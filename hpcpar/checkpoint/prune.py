"""Delete old sets on someone's word, never the newest that is whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from hpcpar.checkpoint.format import side_name, step_of
from hpcpar.checkpoint.verify import named_sets, newest_whole
from hpcpar.errors import CheckpointError


class Pruned(NamedTuple):
    """What was deleted, and the newest set that is whole, which never is."""

    deleted: list[Path]
    whole: Path


def prune(checkpoints: Path, keep: int) -> Pruned:
    """Delete all sets but the newest `keep` and the newest that is whole.

    Raises: CheckpointError, before anything is deleted, if no set is whole. Cost: reads sets until one is whole.
    """
    sets = named_sets(checkpoints)
    whole = newest_whole(sets)
    if whole is None:
        raise CheckpointError(f"{checkpoints}: no set is whole; nothing was deleted")
    old = [path for path in sets[: len(sets) - keep] if path != whole]
    for path in old:
        step = step_of(path.name.strip(".").removesuffix(".old"))
        assert step is not None
        gone = path.with_name(side_name(step, "gone"))
        path.rename(gone)  # so that a kill leaves no published half
        shutil.rmtree(gone)
    return Pruned(old, whole)
