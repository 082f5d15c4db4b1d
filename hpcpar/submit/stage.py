"""The Python environment packed once, and unpacked on every node's own disk by one task before the run.

2128 Pythons that each read thousands of small files storm a shared file system; 266 tasks that each read one large
file do not.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hpcpar.config.job import Submit
from hpcpar.errors import UserError
from hpcpar.submit.starts import check_private

# Unpacked aside and renamed: two jobs may come to a node at once, and a node may have it from the last job
UNPACK = ('set -e; umask 077; mkdir -p "$2"; [ -O "$2" ]; cd "$2"; [ -d "$3" ] || { d=$(mktemp -d .XXXXXX); '
          'tar -xf "$1" -C "$d"; mv -T "$d" "$3" 2>/dev/null || { rm -rf "$d"; [ -d "$3" ]; }; }')


@dataclass(frozen=True)
class Staged:
    """The words that start Python on a rank, and the script's lines that must come before."""

    python: str
    lines: tuple[str, ...] = ()


def stage(wish: Submit, beneath: Path, dry_run: bool = False) -> Staged:
    """Return how ranks start Python: from the environment, a container, or the environment staged on a node's disk.

    The archive lies in `beneath`/.environments, one for all runs with equal packages; a dry run only names it.
    Cost: the first time, reading the whole environment.
    """
    if wish.container:
        if wish.stage_env:
            raise UserError("submit.stage_env", "has no use with submit.container, which is one file already",
                            "give one of them")
        return Staged(f"{wish.container} python3")
    if not wish.stage_env:
        return Staged(shlex.quote(sys.executable))
    archive = _archive(Path(sys.prefix), beneath / ".environments")
    if not dry_run:
        _pack(Path(sys.prefix), archive)
    local = f'"{wish.stage_env}/hpcpar-$USER"'  # the batch shell fills in variables
    words = f"{shlex.quote(UNPACK)} unpack {shlex.quote(str(archive))} {local} {archive.stem}"
    a_node = 'srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 --mpi=none'
    return Staged(f"{local}/{archive.stem}/bin/python", (f"{a_node} bash -c {words} || exit",))


def _archive(prefix: Path, folder: Path) -> Path:
    """Name the archive of the environment at `prefix`, by its packages."""
    if sys.prefix == sys.base_prefix and not (prefix / "conda-meta").is_dir():
        raise UserError("submit.stage_env", f"{prefix} is the system's Python, not an environment of your own",
                        "make a venv or a conda environment, or leave it out")
    packages = sorted((path.name, path.stat().st_mtime_ns) for path in Path(sysconfig.get_path("purelib")).iterdir())
    return folder / f"env-{hashlib.sha256(f'{prefix}{sys.version}{packages}'.encode()).hexdigest()[:12]}.tar"


def _pack(prefix: Path, archive: Path) -> None:
    """Write the archive unless it is there."""
    archive.parent.mkdir(mode=0o700, exist_ok=True)
    check_private(archive.parent)
    if not archive.exists():
        with tempfile.NamedTemporaryFile(dir=archive.parent, delete=False) as partial:
            subprocess.run(["tar", "-cf", "-", "-C", str(prefix), "."], stdout=partial, check=True)
        Path(partial.name).rename(archive)
