"""A rank's flight recorder: where it is and its last calls to other ranks, in a memory file that outlives the rank.

    rank     note(step, phase, action)   begin(call) .. wait(call) .. end(call)        writes, no system call
    witness  opens /proc/PID/fd/FD at the start and reads it at any time, also after the rank's death

    | state, step, times | phase | action | ring of the last 512 calls | texts | fault dump |
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType

RUNNING, DONE, FAILED, TOLD = b"r", b"d", b"f", b"t"
"""A rank's states: at work; ended well; has an error of its own; has printed the root cause."""

_NUMBERS = struct.Struct("<qd")  # step, time of the last note
_COUNTS = struct.Struct("<qq")  # calls begun, the call that is waited for or -1
_CALL = struct.Struct("<IHHQdddiIIi8s")  # see `begin`
_TIME = struct.Struct("<d")
_GROUP = struct.Struct("<H")
_GROUP_AT, _WAITED, _ENDED = 6, 24, 32  # offsets inside a call
_STATE, _STEP, _CALLS, _PHASE, _ACTION, _RING = 0, 8, 24, 64, 128, 512  # offsets
_CAPACITY = 512  # calls
_TEXTS = _RING + _CAPACITY * _CALL.size
_END = _TEXTS + (1 << 16)  # after it the interpreter writes its fault dump

ALIKE = frozenset({"all_reduce", "broadcast", "reduce", "all_gather", "reduce_scatter"})
"""Operations in which every rank must give equally many bytes."""
_PASSED_OVER = ("torch" + os.sep, "mpi_backend.py", "mpi_work.py", "mpi_shared.py", "mpi_lanes.py", "mpi_bells.py",
                "mpi_patience.py", "recorder.py", "control.py", "contextlib.py", "typing_extensions.py")
_COMM = str(Path(__file__).parent)


class Recorder:
    """A rank's side. Only its main thread calls; a note costs about 0.2 µs, a call about 3 µs (benchmarks/recorder)."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("hpcpar-recorder")
        os.ftruncate(self.fd, _END)
        # a fatal signal's stack is written by C code at the file's position
        os.lseek(self.fd, _END, os.SEEK_SET)
        self._memory = mmap.mmap(self.fd, _END)
        self._memory[_STATE:_STATE + 1] = RUNNING
        self.step, self.phase, self.action = -1, "", ""
        self.waits: dict[str, float] = {}  # group ("tp", "dp", ...) -> seconds waited in all its calls so far
        self._names: dict[int, str] = {}  # of groups, by number
        self._short = b""
        self._begun = 0
        self._waiting_since = 0.0
        self._texts: dict[str, int] = {}
        self._texts_end = _TEXTS
        self._sites: dict[tuple[int, ...], int] = {}
        self._kinds: dict[int, tuple[int, CodeType]] = {}
        self._sequences: dict[tuple[int, str, int], int] = {}
        self._marks: dict[int, int] = {}
        _COUNTS.pack_into(self._memory, _CALLS, 0, -1)
        self.note(phase="start")

    def mark(self, state: bytes) -> None:
        """Set the rank's state."""
        self._memory[_STATE:_STATE + 1] = state

    def note(self, step: int | None = None, phase: str | None = None, action: str | None = None) -> None:
        """Keep what is given."""
        if phase is not None and phase != self.phase:
            self.phase = phase
            self._memory[_PHASE:_ACTION] = phase.encode()[:_ACTION - _PHASE].ljust(_ACTION - _PHASE, b"\0")
        if action is not None and action != self.action:
            self.action = action
            text = action.encode()
            self._short = text[:8]
            self._memory[_ACTION:_RING] = text[:_RING - _ACTION].ljust(_RING - _ACTION, b"\0")
        if step is not None:
            self.step = step
        _NUMBERS.pack_into(self._memory, _STEP, self.step, time.time())

    @property
    def waiting(self) -> bool:
        """Whether a call is waited for."""
        return bool(_COUNTS.unpack_from(self._memory, _CALLS)[1] >= 0)

    @property
    def waited_s(self) -> float:
        """Seconds waited in all calls so far."""
        return sum(self.waits.values())

    def group(self, name: str, ranks: Sequence[int]) -> int:
        """Return the number of a group of global ranks, for `begin`."""
        number = self._text(f"{name} {format_ranks(ranks)}")
        self._names[number] = name
        return number

    def begin(self, group: int, operation: str, num_bytes: int, peer: int = -1) -> int:
        """Record that a call begins, and who called; return its number. `peer`: the other global rank of a message.

        Calls of a group are counted: collectives together, messages by operation and peer. The mark is a hash over
        all collectives of the group so far, so that two ranks compare their whole past by one number.
        """
        key = (group, operation, peer) if peer >= 0 else (group, "", -1)
        sequence = self._sequences[key] = self._sequences.get(key, 0) + 1
        code = self._text(operation)
        mark = 0
        if peer < 0:
            own = _checksum(operation) + (num_bytes if operation in ALIKE else 0)
            mark = self._marks[group] = (self._marks.get(group, 0) * 1000003 + own) & 0xFFFFFFFF
        number = self._begun
        self._begun = number + 1
        _CALL.pack_into(self._memory, _RING + number % _CAPACITY * _CALL.size, sequence, code, group, num_bytes,
                        time.time(), 0.0, 0.0, self.step, self._site(), mark, peer, self._short)
        _COUNTS.pack_into(self._memory, _CALLS, self._begun, -1)
        return number

    def wait(self, number: int) -> None:
        """Record that this rank now waits for a call."""
        now = self._waiting_since = time.time()
        if number >= self._begun - _CAPACITY:
            _TIME.pack_into(self._memory, _RING + number % _CAPACITY * _CALL.size + _WAITED, now)
        _COUNTS.pack_into(self._memory, _CALLS, self._begun, number)

    def end(self, number: int) -> None:
        """Record that a call is complete."""
        now = time.time()
        if number >= self._begun - _CAPACITY:
            _TIME.pack_into(self._memory, _RING + number % _CAPACITY * _CALL.size + _ENDED, now)
        if self._waiting_since:
            (group,) = _GROUP.unpack_from(self._memory, _RING + number % _CAPACITY * _CALL.size + _GROUP_AT)
            name = self._names.get(group, "")
            self.waits[name] = self.waits.get(name, 0.0) + now - self._waiting_since
            self._waiting_since = 0.0
            _COUNTS.pack_into(self._memory, _CALLS, self._begun, -1)

    def _text(self, text: str) -> int:
        """Return a text's number; a full table gives the number of an empty one."""
        number = self._texts.get(text)
        if number is None:
            raw = text.encode()[:250] + b"\n"
            if self._texts_end + len(raw) > _END or len(self._texts) > 0xFFF0:
                return 0xFFFF
            number = self._texts[text] = len(self._texts)
            self._memory[self._texts_end:self._texts_end + len(raw)] = raw
            self._texts_end += len(raw)
        return number

    def _site(self) -> int:
        """Return the number of the text that says who called: the line in this room, and the line that led there."""
        frame: FrameType | None = sys._getframe(2)
        inner = outer = None
        while frame is not None and outer is None:
            code = frame.f_code
            known = self._kinds.get(id(code))
            if known is None:
                known = self._kinds[id(code)] = (_kind(code), code)  # kept, so that the number stays its own
            if known[0] == 2:
                outer = frame
            if known[0] and inner is None:
                inner = frame
            frame = frame.f_back
        if inner is None:
            return 0xFFFF
        outer = outer or inner
        key = (id(inner.f_code), inner.f_lasti, id(outer.f_code), outer.f_lasti)
        number = self._sites.get(key)
        if number is None:
            text = _line(inner) if inner is outer else f"{_line(inner)}, from {_line(outer)}"
            number = self._sites[key] = self._text(text)
        return number


def _kind(code: CodeType) -> int:
    """Return 0 for code that is passed over, 1 for this room's, 2 for a caller's."""
    name = code.co_filename
    if any(part in name for part in _PASSED_OVER) or name.startswith("<frozen"):
        return 0
    return 1 if name.startswith(_COMM) else 2


def _line(frame: FrameType) -> str:
    short = "/".join(Path(frame.f_code.co_filename).parts[-2:])
    return f"{short}:{frame.f_lineno} in {frame.f_code.co_name}"


def _checksum(operation: str) -> int:
    return int.from_bytes(operation.encode(), "little") % 0xFFFFFFFB


def format_ranks(ranks: Sequence[int]) -> str:
    """Write ranks briefly: 0-7, 0-14:2 (every second), or 0,3,4."""
    if len(ranks) > 2 and len({b - a for a, b in pairwise(ranks)}) == 1:
        stride = ranks[1] - ranks[0]
        return f"{ranks[0]}-{ranks[-1]}" + (f":{stride}" if stride != 1 else "")
    return ",".join(map(str, ranks))


def parse_ranks(text: str) -> tuple[int, ...]:
    """Read what `format_ranks` wrote."""
    if "-" not in text:
        return tuple(map(int, text.split(",")))
    first, _, rest = text.partition("-")
    last, _, stride = rest.partition(":")
    return tuple(range(int(first), int(last) + 1, int(stride or 1)))


@dataclass(frozen=True)
class Call:
    """A recorded call: the `sequence`-th of its group (messages: of its operation and peer). Times are Unix seconds."""

    sequence: int
    operation: str
    group: str
    num_bytes: int
    begun: float
    waited: float
    ended: float
    step: int
    site: str
    mark: int
    peer: int
    action: str

    @property
    def ranks(self) -> tuple[int, ...]:
        """The group's global ranks."""
        return parse_ranks(self.group.rpartition(" ")[2])

    @property
    def what(self) -> tuple[str, int]:
        """What all ranks of a collective must have in common."""
        return self.operation, self.num_bytes if self.operation in ALIKE else 0

    def __str__(self) -> str:
        name, _, ranks = self.group.rpartition(" ")
        peer = "" if self.peer < 0 else f" {'to' if self.operation == 'send' else 'from'} rank {self.peer}"
        return (f"{self.operation}{peer} of {self.num_bytes} bytes, call {self.sequence} of group {name} "
                f"(ranks {ranks}), in step {self.step} at {self.site}")


@dataclass(frozen=True)
class LastWords:
    """What a rank's recorder says, read by anyone."""

    state: bytes = RUNNING
    step: int | None = None
    noted: float | None = None
    phase: str = "start"
    action: str = ""
    begun: int = 0  # calls
    waiting: int = -1  # the number of the call that is waited for
    fault: tuple[str, ...] = ()
    calls: tuple[Call, ...] = ()  # the newest, oldest first

    @property
    def call(self) -> Call | None:
        """The call that the rank waits for, else its last one."""
        if self.waiting >= 0 and self.begun - self.waiting <= len(self.calls):
            return self.calls[len(self.calls) - (self.begun - self.waiting)]
        return self.calls[-1] if self.calls else None

    @classmethod
    def read(cls, fd: int, num_calls: int = _CAPACITY) -> LastWords:
        """Read a recorder; a note cut off by death is read as far as it came."""
        raw = os.pread(fd, _END + (1 << 16), 0) if num_calls else os.pread(fd, _RING, 0)
        step, noted = _NUMBERS.unpack_from(raw, _STEP)
        begun, waiting = _COUNTS.unpack_from(raw, _CALLS)
        phase, action = (raw[a:b].rstrip(b"\0").decode(errors="replace")
                         for a, b in ((_PHASE, _ACTION), (_ACTION, _RING)))
        fault = tuple(raw[_END:].decode(errors="replace").splitlines())
        calls = tuple(_read_calls(raw, begun, num_calls)) if num_calls else ()
        return cls(raw[:1], None if step < 0 else step, noted, phase, action, begun, waiting, fault, calls)


def _read_calls(raw: bytes, begun: int, num_calls: int) -> Iterator[Call]:
    texts = raw[_TEXTS:_END].partition(b"\0")[0].decode(errors="replace").split("\n")
    known = dict(enumerate(texts))
    for number in range(max(0, begun - min(num_calls, _CAPACITY)), begun):
        row = _CALL.unpack_from(raw, _RING + number % _CAPACITY * _CALL.size)
        sequence, operation, group, num_bytes, begun_at, waited, ended, step, site, mark, peer, action = row
        yield Call(sequence, known.get(operation, "?"), known.get(group, "? 0"), num_bytes, begun_at, waited, ended,
                   step, known.get(site, "?"), mark, peer, action.rstrip(b"\0").decode(errors="replace"))
