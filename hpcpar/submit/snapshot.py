"""The package's source, frozen at submission: what is edited afterwards does not change what runs."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Snapshot:
    """A copy of the package: `folder` goes first on PYTHONPATH, `sha256` (also in `folder`/SHA256) says what it is."""

    folder: Path
    sha256: str


def source_sha256(package: Path) -> str:
    """Return one hash of all the files of a package: their names inside it and what is in them."""
    digest = hashlib.sha256()
    for name, path in _files(package):
        digest.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def take_snapshot(package: Path, beneath: Path) -> Snapshot:
    """Copy `package` to `beneath`/code-<hash>/ and return the copy.

    The same source gives the same folder, other source another one: a queued job keeps what it was submitted with.
    """
    sha256 = source_sha256(package)
    folder = beneath / f"code-{sha256[:12]}"
    if folder.is_dir() and source_sha256(folder / package.name) == sha256:
        return Snapshot(folder, sha256)
    shutil.rmtree(folder, ignore_errors=True)  # somebody edited the copy
    partial = Path(tempfile.mkdtemp(prefix=".code-", dir=beneath))
    for name, path in _files(package):
        target = partial / package.name / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (partial / "SHA256").write_text(sha256 + "\n")
    partial.chmod(0o755)  # mkdtemp makes it 0700; the folder above decides who reads
    partial.rename(folder)
    return Snapshot(folder, source_sha256(folder / package.name))


def _files(package: Path) -> list[tuple[str, Path]]:
    found = ((path.relative_to(package).as_posix(), path) for path in package.rglob("*") if path.is_file())
    return sorted((name, path) for name, path in found if "__pycache__" not in path.parts)
