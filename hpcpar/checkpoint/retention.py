"""Which sets stay: the newest few, every k-th step's, and always one that is whole."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from hpcpar.checkpoint.format import read_manifest, side_name, step_of
from hpcpar.checkpoint.verify import published_sets
from hpcpar.errors import CheckpointError

_logger = logging.getLogger(__name__)


def retire(checkpoints: Path, step: int, keep: int, keep_every: int = 0) -> list[Path]:
    """Delete old sets and return their paths: all up to `step` but the newest `keep` (0: all stay).

    Sets of steps that `keep_every` divides stay for good (0: none) and do not count. Nothing is deleted unless the
    newest set up to `step` has all its files at their sizes; a set that cannot be deleted is a warning.
    Cost: reads every manifest, and asks the sizes of one set's files.
    """
    found = [(number, path) for path in published_sets(checkpoints)
             if (number := step_of(path.name)) is not None and number <= step]
    passing = [path for number, path in found if not (keep_every and number % keep_every == 0)]
    old = passing[:-keep] if keep else []
    if not old:
        return []
    why = missing(found[-1][1])
    if why:
        _logger.warning("older sets stay: %s", why)
        return []
    return [path for path in old if _delete(path)]


def missing(path: Path) -> str:
    """Say which file of a set is absent or has another size than the manifest says; an empty string if none."""
    try:
        for entry in read_manifest(path).files:
            size = (path / entry.name).stat().st_size
            if size != entry.size:
                return f"{path / entry.name} has {size} bytes, {entry.size} were written"
    except (OSError, CheckpointError) as error:
        return str(error)
    return ""


def _delete(path: Path) -> bool:
    number = step_of(path.name)
    assert number is not None
    gone = path.with_name(side_name(number, "gone"))
    try:
        path.rename(gone)  # so that a kill leaves no published half
        shutil.rmtree(gone)
    except OSError as error:
        _logger.warning("old set %s could not be deleted: %s", path.name, error)
        return False
    return True
