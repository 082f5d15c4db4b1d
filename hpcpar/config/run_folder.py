"""Where a run keeps what: the names inside a run folder, in one place."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcpar.errors import UserError


@dataclass(frozen=True)
class RunFolder:
    """A run folder; nothing is created until `create()`."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved job."""
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        """One JSON line a step."""
        return self.path / "metrics.jsonl"

    @property
    def journal(self) -> Path:
        """One JSON line a start, and a clean end."""
        return self.path / "journal.jsonl"

    @property
    def logs(self) -> Path:
        """One text file a rank."""
        return self.path / "logs"

    @property
    def watch(self) -> Path:
        """What the hosts' witnesses tell one another."""
        return self.logs / "watch"

    @property
    def hosts(self) -> Path:
        """Which rank runs on which host."""
        return self.watch / "hosts.json"

    @property
    def checkpoints(self) -> Path:
        """Published sets, `step-00000100/` each."""
        return self.path / "checkpoints"

    @property
    def failure(self) -> Path:
        """The root cause of a failed run."""
        return self.path / "failure.json"

    @property
    def running(self) -> Path:
        """Which process is at work here."""
        return self.path / "RUNNING"

    @property
    def stop(self) -> Path:
        """Created by anyone to make the run save and stop."""
        return self.path / "STOP"

    @property
    def rewinds(self) -> Path:
        """What was asked of --rewind-to and --skip-samples, a JSON line each."""
        return self.path / "rewinds.jsonl"

    @property
    def timeline(self) -> Path:
        """What every stage did when, in the last step."""
        return self.path / "timeline.json"

    def log(self, global_rank: int) -> Path:
        """A rank's log."""
        return self.logs / f"rank-{global_rank:05d}.log"

    @property
    def submission(self) -> Path:
        """What submission keeps: the job as submitted, frozen code, scripts, starts."""
        return self.path / "submit"

    def create(self) -> None:
        """Make the folder, which only its owner may enter, and its parts. Raises: UserError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700, exist_ok=True)
            for folder in (self.logs, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError("--run", f"{self.path} cannot be a run folder: {error.filename}: {error.strerror}",
                            "give a folder of yours, or one that does not exist yet") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines, such as metrics.jsonl; a line torn by a kill, or a missing file, is no error."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(text))
    return found
