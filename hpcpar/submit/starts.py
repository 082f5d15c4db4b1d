"""What submission remembers of a run between its jobs: its starts and ends, and the nodes that let it down.

    RUN/submit/job.toml       the resolved job as submitted (config.toml is what runs; elastic runs change dp)
    RUN/submit/starts.jsonl   a line a start and a line an end: time, job, nodes, newest published step, how it ended
    RUN/submit/bad-nodes      a line a node: its name, a blank, why; delete a line to allow that node again
    RUN/submit/nodes/         what the prologue has measured on every node, a JSON each
    RUN/submit/go-on          made by rank 0: stopped cleanly and saved, but there is more to do
    RUN/submit/heir           made by the first node that acts for the lost one of the batch script
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcpar.config.run_folder import RunFolder, read_lines
from hpcpar.errors import UserError


@dataclass(frozen=True)
class Starts:
    """The memory of one run folder."""

    folder: RunFolder

    @property
    def job(self) -> Path:
        """The resolved job as it was submitted."""
        return self.folder.submission / "job.toml"

    @property
    def go_on(self) -> Path:
        """Made by rank 0 where there is more to do."""
        return self.folder.submission / "go-on"

    @property
    def heir(self) -> Path:
        """Made by the one node that does what the lost batch script would have done."""
        return self.folder.submission / "heir"

    @property
    def nodes(self) -> Path:
        """What the prologue has found, a file a node."""
        return self.folder.submission / "nodes"

    def lines(self) -> list[dict[str, Any]]:
        """Return all starts and ends, oldest first; a line cut off by a dying node is left out."""
        return read_lines(self.folder.submission / "starts.jsonl")

    def began(self) -> float:
        """Return when the newest start was, in seconds; 0 where there was none."""
        return max((line["time"] for line in self.lines() if "nodes" in line), default=0.0)

    def note(self, **what: Any) -> None:
        """Add a line."""
        line = {"time": round(time.time(), 3), **what, "step": self.newest_step()}
        with (self.folder.submission / "starts.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def fruitless(self) -> int:
        """Return how many starts, the last ones in a row, found the same newest step that is there now."""
        steps: list[int | None] = []
        for line in self.lines():
            if "nodes" in line:
                steps.append(line["step"])
            elif "unfit" in line and steps:
                steps.pop()  # its nodes were refused before the ranks started
        newest = self.newest_step()
        return next((n for n, step in enumerate(reversed(steps)) if step != newest), len(steps))

    def newest_step(self) -> int | None:
        """Return the newest published step, by its name."""
        found = self.folder.checkpoints.glob("step-*[0-9]/manifest.json")
        return max((int(path.parent.name.removeprefix("step-")) for path in found), default=None)

    def bad_nodes(self) -> dict[str, str]:
        """Return the nodes not to use again, and why."""
        lines = _read(self.folder.submission / "bad-nodes").splitlines()
        return {name: why for name, _, why in (line.partition(" ") for line in lines) if name}

    def add_bad_nodes(self, nodes: dict[str, str]) -> None:
        """Remember nodes that let the run down."""
        new = [f"{name} {why}\n" for name, why in nodes.items() if name not in self.bad_nodes()]
        if not new:
            return
        with (self.folder.submission / "bad-nodes").open("a") as file:
            file.writelines(new)

    def failure(self, since: float) -> dict[str, Any] | None:
        """Return failure.json if it was written after `since`."""
        try:
            if self.folder.failure.stat().st_mtime < since:
                return None
            return dict(json.loads(self.folder.failure.read_text()))
        except (OSError, ValueError):
            return None


def check_private(*folders: Path) -> None:
    """Raise UserError unless nobody but this user can write in these folders, or to the pickles in them.

    submitit unpickles what lies there: who can write it runs code in the job, in our name.
    """
    for folder in folders:
        for path in (folder, *folder.glob("*.pkl")):
            found = path.lstat()
            if found.st_uid != os.geteuid() or (found.st_mode & 0o022 and not path.is_symlink()):
                raise UserError(str(path), "can be written by others, who could run code in this job",
                                f"chmod -R go-w {folder}, or choose another --run folder")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
