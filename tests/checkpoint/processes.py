"""Find the writers of a folder, as `ps` would."""

from __future__ import annotations

import time
from pathlib import Path


def writers(checkpoints: Path) -> dict[str, int]:
    """Return the living writers' process ids by rank name."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            dead = (process / "stat").read_text().rpartition(")")[2].split()[0] in "XZ"
        except OSError:
            continue
        if "hpcpar.checkpoint.writer" in words and str(checkpoints) in words and not dead:
            found[words[words.index(str(checkpoints)) + 1]] = int(process.name)
    return found


def await_no_writer(checkpoints: Path, limit_s: float = 10) -> None:
    end = time.monotonic() + limit_s
    while left := writers(checkpoints):
        assert time.monotonic() < end, f"writers are left: {left}"
        time.sleep(0.02)
