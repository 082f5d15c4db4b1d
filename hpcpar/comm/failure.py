"""What a failed run leaves behind: a rank's last words, and the one root cause that the first to find it publishes."""

from __future__ import annotations

import json
import mmap
import os
import struct
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from hpcpar.config.run_folder import RunFolder

RUNNING, DONE, FAILED, TOLD = b"r", b"d", b"f", b"t"
"""A rank's states: at work; ended well; has an error of its own; has printed the root cause."""

_NUMBERS = struct.Struct("<qd")  # step, time of the last note
_STATE, _STEP, _PHASE, _ACTION, _END = 0, 8, 24, 88, 512  # offsets; after _END the interpreter writes its fault dump
_TAIL = 20


class Status:
    """A rank's side of its last words: an anonymous memory file, so that a note needs no system call.

    The witness opens it as /proc/PID/fd/FD; nothing is left on disk or in /dev/shm when the rank is killed.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("hpcpar-status")
        os.ftruncate(self.fd, _END)
        # a fatal signal's stack is written by C code at the file's position
        os.lseek(self.fd, _END, os.SEEK_SET)
        self._memory = mmap.mmap(self.fd, _END)
        self._memory[_STATE:_STATE + 1] = RUNNING
        self.step, self.phase, self.action = -1, "", ""
        self.note(phase="start")

    def mark(self, state: bytes) -> None:
        """Set the rank's state."""
        self._memory[_STATE:_STATE + 1] = state

    def note(self, step: int | None = None, phase: str | None = None, action: str | None = None) -> None:
        """Keep what is given. Cost: about a microsecond."""
        if phase is not None and phase != self.phase:
            self.phase = phase
            self._memory[_PHASE:_ACTION] = phase.encode()[:_ACTION - _PHASE].ljust(_ACTION - _PHASE, b"\0")
        if action is not None and action != self.action:
            self.action = action
            self._memory[_ACTION:_END] = action.encode()[:_END - _ACTION].ljust(_END - _ACTION, b"\0")
        if step is not None:
            self.step = step
        _NUMBERS.pack_into(self._memory, _STEP, self.step, time.time())


@dataclass(frozen=True)
class LastWords:
    """What a rank's status file says, read by anyone."""

    state: bytes = RUNNING
    step: int | None = None
    noted: float | None = None
    phase: str = "start"
    action: str = ""
    fault: tuple[str, ...] = ()

    @classmethod
    def read(cls, fd: int) -> LastWords:
        """Read a status file; a note cut off by death is read as far as it came."""
        raw = os.pread(fd, 1 << 16, 0)
        step, noted = _NUMBERS.unpack_from(raw, _STEP)
        texts = raw[_PHASE:_ACTION], raw[_ACTION:_END]
        phase, action = (text.rstrip(b"\0").decode(errors="replace") for text in texts)
        fault = tuple(raw[_END:].decode(errors="replace").splitlines())
        return cls(raw[:1], None if step < 0 else step, noted, phase, action, fault)


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
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
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
    """Write to stderr in one piece, past Python's buffers; a reader that has gone is no error."""
    data = text.encode(errors="replace")
    try:
        while data:
            data = data[os.write(2, data):]
    except OSError:
        pass
