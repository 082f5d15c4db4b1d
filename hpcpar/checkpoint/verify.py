"""Which sets are there, and whether their files are what was written; nothing here opens a file with libhdf5.

That order matters: a corrupt file can hang or crash libhdf5, and a missing source of a virtual dataset reads as fill
values without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcpar.checkpoint.format import (
    RUN_ID,
    FileEntry,
    Manifest,
    check_manifest,
    read_manifest,
    set_name,
    side_name,
    step_of,
)
from hpcpar.checkpoint.store import checksum_file
from hpcpar.comm.control import Control
from hpcpar.errors import CheckpointError


@dataclass(frozen=True)
class Damage:
    """A file of a set that is not what was written, and the tensors that have a part in it."""

    file: str
    why: str
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        more = f" and {len(self.tensors) - 3} more" if len(self.tensors) > 3 else ""
        hit = f"tensors hit: {', '.join(self.tensors[:3])}{more}" if self.tensors else "the index; no tensor is hit"
        return f"{self.file} {self.why} ({hit})"


def published_sets(checkpoints: Path) -> list[Path]:
    """List the published sets whose manifest is intact, oldest step first. Cost: hashes every manifest."""
    return [path for path in named_sets(checkpoints) if not _unreadable(path)]


def latest_set(checkpoints: Path) -> Path | None:
    """Return the published set of the highest step, or None if there is none; decided by looking, not by a pointer.

    Raises: CheckpointError if that set's manifest is damaged: going on from an older one is for people to decide.
    Cost: hashes that manifest (2 MiB for a run of 2128 ranks: a few ms); nothing is parsed.
    """
    named = named_sets(checkpoints)
    if not named:
        return None
    why = _unreadable(named[-1])
    if why:
        others = published_sets(checkpoints)
        raise CheckpointError(f"the newest set cannot be used: {why}; {offer(checkpoints, others[-1:])}")
    return named[-1]


def offer(checkpoints: Path, good: list[Path]) -> str:
    """Say how to go on from the last of `good` sets, or that there is none."""
    if not good:
        return "no other set is whole"
    return f"to go on from {good[-1].name}: hpcpar ckpt rewind {checkpoints.parent} {good[-1].name}"


def rewind(checkpoints: Path, path: Path) -> list[Path]:
    """Make `path` the newest set: rename all newer ones to `<name>.aside`, and return their new paths.

    Nothing is deleted. The set itself is verified first. Raises: CheckpointError. Cost: reads the whole set.
    """
    verify_set(path)
    named = named_sets(checkpoints)
    (checkpoints / RUN_ID).unlink(missing_ok=True)  # what is in memory may be newer
    moved = []
    for newer in named[named.index(path) + 1 :]:
        name, number = newer.name.strip(".").removesuffix(".old"), 1
        aside = checkpoints / f"{name}.aside"
        while aside.exists():
            aside, number = checkpoints / f"{name}.aside-{number}", number + 1
        newer.rename(aside)
        moved.append(aside)
    return moved


def read_state(path: Path) -> dict[str, Any]:
    """Return what the trainer gave `save_set` as state, after JSON (tuples are lists). Raises: CheckpointError."""
    return dict(read_manifest(path).state)


def verify_set(path: Path, files: Iterable[str] | None = None) -> Manifest:
    """Check that a set's files (default: all; else these names) are present and have their size and checksum.

    Raises: CheckpointError that names every bad file and the tensors in it. Cost: reads each file once.
    """
    manifest = read_manifest(path)
    bad = find_damage(path, manifest, files)
    if bad:
        raise CheckpointError(f"{path}: {'; '.join(map(str, bad))}")
    return manifest


def find_damage(path: Path, manifest: Manifest, files: Iterable[str] | None = None,
                note: Callable[[int], object] = lambda num_bytes: None) -> list[Damage]:
    """List what is wrong with a set's files (default: all; else these names).

    `note` is told of bytes as they are checked, those of files that are absent or too short included.
    """
    wanted = None if files is None else set(files)
    found = []
    for entry in manifest.files:
        if wanted is None or entry.name in wanted:
            why = _wrong(path, entry, note)
            if why:
                found.append(Damage(entry.name, why, tuple(sorted({box.tensor for box in entry.boxes}))))
    return found


def newest_whole(sets: list[Path], verify: Callable[[Path], object] = verify_set) -> Path | None:
    """Return the newest of `sets` (oldest first) that `verify` passes, or None. Cost: reads sets until one is whole."""
    for path in reversed(sets):
        try:
            verify(path)
        except CheckpointError:
            continue
        return path
    return None


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


def named_sets(checkpoints: Path) -> list[Path]:
    """List the sets by name, oldest first, readable or not; one that a killed save moved aside (.old) counts."""
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
        check_manifest(path)
    except CheckpointError as error:
        return str(error)
    return ""


def _wrong(path: Path, entry: FileEntry, note: Callable[[int], object]) -> str:
    """Say what is wrong with a file, or return an empty string."""
    file = path / entry.name
    try:
        size = file.stat().st_size
        if size == entry.size:
            wrong = checksum_file(file, note).checksum != entry.checksum
            return "holds other bytes than were written (checksum)" if wrong else ""
        why = f"has {size} bytes, {entry.size} were written"
    except FileNotFoundError:
        why = "is missing"
    except OSError as error:
        why = f"cannot be read: {error.strerror}"
    note(entry.size)
    return why
