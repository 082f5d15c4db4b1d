"""What a failed run leaves behind: the one root cause, which the first to find it publishes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hpcpar.config.run_folder import RunFolder

_TAIL = 20
_RELAY_S = 5.0
_INHERIT_S = 40.0


@dataclass(frozen=True)
class Failure:
    """The root cause of a failed run, as failure.json keeps it."""

    host: str
    rank: int
    size: int
    coordinates: dict[str, int]
    step: int | None
    phase: str
    action: str
    error: str
    message: str
    traceback: tuple[str, ...]
    log: str
    time: str
    idle_s: float | None = None
    call: str = ""  # the rank's last call to others: operation, bytes, group, number, file and line

    def publish(self, run: RunFolder) -> bool:
        """Write failure.json if there is none; return whether this is the root cause. Raises: OSError."""
        return publish_once(run.failure, json.dumps(asdict(self), indent=1) + "\n")

    def block(self, run: RunFolder) -> str:
        """Return the root-cause block."""
        at = " ".join(f"{axis} {place}" for axis, place in self.coordinates.items())
        idle = "" if self.idle_s is None else f" (last sign of life {self.idle_s:.1f} s before)"
        others = self.size - 1
        lines = [
            "hpcpar: ROOT CAUSE OF THE FAILED RUN",
            f"  rank    {self.rank} of {self.size} on host {self.host} ({at})",
            f"  when    step {'?' if self.step is None else self.step}, phase {self.phase}, "
            f"last action {self.action or 'unknown'}{idle}",
            *([f"  call    {self.call}"] if self.call else []),
            f"  error   {self.error}: {self.message}",
            *(f"  | {line}" for line in self.traceback),
            f"  others  {others} other rank{'s' * (others != 1)} ended because of it",
            f"  logs    {self.log}; this block: {run.failure}",
        ]
        return "\n".join(lines) + "\n"


def tail(lines: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Return the last lines of a traceback."""
    return tuple(line for line in lines if line.strip())[-_TAIL:]


def now() -> str:
    """Return the time as failure.json writes it (UTC)."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def mistake(run: RunFolder) -> Path:
    """Return the file that the one rank creates which prints a user's mistake."""
    return run.logs / ".mistake"


def death(run: RunFolder, rank: int, time_s: float) -> Path:
    """Return the file that says when a rank died; the names sort by time."""
    return run.logs / f".death-{time_s:017.6f}-{rank:05d}"


def deaths(run: RunFolder) -> list[Path]:
    """Return what the witnesses of all hosts have seen."""
    return list(run.logs.glob(".death-*"))


def publish_once(path: Path, text: str) -> bool:
    """Create a file with all of its text, or return False where it exists already.

    A link appears whole and only once, on NFS too, where exclusive creation shows readers a half-written file.
    """
    draft = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with draft.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        return _linked(draft, path, text)
    finally:
        draft.unlink(missing_ok=True)


def _linked(draft: Path, path: Path, text: str) -> bool:
    try:
        os.link(draft, path)
    except FileExistsError:
        return draft.stat().st_nlink == 2  # NFS repeats a call whose answer was lost: then it is our own
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        try:  # a file system without hard links
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            return False
    return True


def appeared(path: Path) -> bool:
    """Return whether a file exists by now, perhaps made on another host."""
    try:
        # NFS answers "no such file" from its cache for up to a minute unless the folder is opened anew
        os.close(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY))
        return path.exists()
    except OSError:
        return False


def say(text: str) -> None:
    """Write to stderr in one piece, past Python's buffers, and wait for its reader; one that has gone is no error."""
    data = text.encode(errors="replace")
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data):]
        await_reader(2)


def inherit(orphaned: Sequence[str]) -> None:
    """Run Python with these words, if any: it looks whether the launcher's host is lost, and does what is left to do.

    Before the ranks of a failed run are ended: then a scheduler ends all that is left of the job on this host.
    """
    if orphaned:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            nothing = subprocess.DEVNULL
            child = subprocess.Popen([sys.executable, *orphaned], stdin=nothing, stdout=nothing, stderr=nothing)
            child.wait(_INHERIT_S)  # one that a file system holds is left: not even a kill would end it


def await_reader(stream: int) -> None:
    """Wait until all that was written to a pipe has been read, for 5 seconds at most; a file is not waited for.

    The reader is the launcher: what it has not read when a rank aborts the job, it throws away. Raises: OSError.
    """
    limit = time.monotonic() + _RELAY_S
    while stat.S_ISFIFO(os.fstat(stream).st_mode) and _unread(stream) and time.monotonic() < limit:
        time.sleep(0.01)


def _unread(pipe: int) -> int:
    """Return how many bytes stand in a pipe, asked at its writing end."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)
