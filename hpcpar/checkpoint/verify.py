"""Which sets are there, and whether their files are what was written; nothing here opens a file with libhdf5.

That order matters: a corrupt file can hang or crash libhdf5, and a missing source of a virtual dataset reads as fill
values without an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hpcpar.checkpoint.format import FileEntry, Manifest, read_manifest, set_name, side_name, step_of
from hpcpar.checkpoint.store import checksum_file
from hpcpar.comm.control import Control
from hpcpar.errors import CheckpointError


def published_sets(checkpoints: Path) -> list[Path]:
    """List the published sets that have a readable manifest, oldest step first. Cost: reads every manifest."""
    return [path for path in _named_sets(checkpoints) if not _unreadable(path)]


def latest_set(checkpoints: Path) -> Path | None:
    """Return the published set of the highest step, or None if there is none; decided by looking, not by a pointer.

    Raises: CheckpointError if that set's manifest cannot be read: going on from an older one is for people to decide.
    """
    named = _named_sets(checkpoints)
    if not named:
        return None
    why = _unreadable(named[-1])
    if why:
        good = published_sets(checkpoints)
        offer = f"to go on from {good[-1].name}, move {named[-1].name} away" if good else "there is no other set"
        raise CheckpointError(f"the newest set cannot be used: {why}; {offer}")
    return named[-1]


def read_state(path: Path) -> dict[str, Any]:
    """Return what the trainer gave `save_set` as state, after JSON (tuples are lists). Raises: CheckpointError."""
    return dict(read_manifest(path).state)


def verify_set(path: Path, files: Iterable[str] | None = None) -> Manifest:
    """Check that a set's files (default: all; else these names) are present and have their size and checksum.

    Raises: CheckpointError that names every bad file and the tensors in it. Cost: reads each file once.
    """
    manifest = read_manifest(path)
    wanted = None if files is None else set(files)
    bad = [why for entry in manifest.files if wanted is None or entry.name in wanted if (why := _wrong(path, entry))]
    if bad:
        raise CheckpointError(f"{path}: {'; '.join(bad)}")
    return manifest


def verify_together(path: Path, control: Control) -> Manifest:
    """Verify a whole set, a share of the files on each rank. Every rank must call; all raise the same error."""
    found, why = None, ""
    try:
        found = read_manifest(path)
        verify_set(path, [entry.name for entry in found.files[control.rank :: control.size]])
    except CheckpointError as error:
        why = str(error)
    reasons = sorted({reason for reason in control.all_gather(why) if reason})
    if reasons or found is None:
        raise CheckpointError("; ".join(reasons))
    return found


def _named_sets(checkpoints: Path) -> list[Path]:
    """List the sets by name, oldest first: published ones, and those moved aside by a save that was then killed."""
    if not checkpoints.is_dir():
        return []
    names = {entry.name for entry in checkpoints.iterdir() if entry.is_dir()}
    found = {step: name for name in names if (step := step_of(name)) is not None}
    for name in names:
        step = step_of(name[1:-4]) if name.endswith(".old") else None
        if step is not None and name == side_name(step, "old") and set_name(step) not in names:
            found[step] = name
    return [checkpoints / found[step] for step in sorted(found)]


def _unreadable(path: Path) -> str:
    try:
        read_manifest(path)
    except CheckpointError as error:
        return str(error)
    return ""


def _wrong(path: Path, entry: FileEntry) -> str:
    """Say what is wrong with a file, or return an empty string."""
    file = path / entry.name
    try:
        size = file.stat().st_size
        if size != entry.size:
            why = f"has {size} bytes, {entry.size} were written"
        elif checksum_file(file).checksum != entry.checksum:
            why = "its bytes are not those that were written (checksum)"
        else:
            return ""
    except FileNotFoundError:
        why = "is missing"
    except OSError as error:
        why = f"cannot be read: {error.strerror}"
    return f"{entry.name} {why}{_tensors_in(entry)}"


def _tensors_in(entry: FileEntry) -> str:
    names = sorted({box.tensor for box in entry.boxes})
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" (tensors hit: {', '.join(names[:3])}{more})" if names else " (the index; no tensor is hit)"
