"""Turns of ranks on one host in memory that all of them have mapped: part of `mpi_backend`.

    lane of a rank   | arrived | taken | slot 0 | slot 1 |     lane after lane in a file that has lost its name

    turn n of a rank     put its bytes into slot n % 2 of its lane (once all have taken turn n - 2);  arrived = n
                         once all have arrived at n: copy or sum out of the others' slots;            taken = n

MPI needs log(size) to size rounds for a collective, and a copy in each; with more ranks than cores every round waits
for the scheduler. Here it is one round.

Memory order: the counters are plain 8-byte words; `Lanes._fence` keeps data and counter in order on every processor.
"""

from __future__ import annotations

import mmap
import os
import threading
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mpi4py import MPI
from torch import Tensor

_HEAD_BYTES = 128  # the two counters, a cache line each
_FOLDER = Path("/dev/shm")


@dataclass
class Turn:
    """What a rank does in one turn."""

    put: Callable[[Tensor], object] | None  # its bytes into its slot; None: the others need none
    take: Callable[[list[Tensor]], object]  # what it wants out of all ranks' slots
    chained: bool = False  # what it puts there is what the turn before took
    held: bool = False  # the others read the caller's own memory: over when all have taken


class Lanes:
    """A group's lanes, and the turns that this rank has begun; all ranks begin the same ones in one order."""

    def __init__(self, memory: mmap.mmap, rank: int, size: int, slot_bytes: int):
        self._rank, self.slot_bytes = rank, slot_bytes
        lane = _lane_bytes(slot_bytes)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        starts = [r * lane + _HEAD_BYTES for r in range(size)]
        self._slots = [[whole[s + n * slot_bytes:s + (n + 1) * slot_bytes] for s in starts] for n in (0, 1)]
        words = memoryview(memory).cast("q")
        self._arrived, self._taken = words[0::lane // 8], words[8::lane // 8]
        self._num_begun = self._num_arrived = self._num_taken = 0
        self._waiting: deque[Turn] = deque()  # not yet taken, the oldest first
        self._held: set[int] = set()  # numbers of turns that are over when all have taken
        self._lock = threading.Lock()

    def begin(self, turns: Sequence[Turn]) -> Ticket:
        """Start turns, as far as they go without waiting."""
        for turn in turns:
            self._num_begun += 1
            self._waiting.append(turn)
            if turn.held:
                self._held.add(self._num_begun)
        self.advance()
        return Ticket(self, self._num_begun)

    @property
    def idle(self) -> bool:
        """Whether every turn that was begun is taken."""
        return not self._waiting

    def advance(self) -> None:
        """Go on with what has begun as far as that goes without waiting."""
        while self._arrive() or self._take():
            pass

    def _arrive(self) -> bool:
        index = self._num_arrived - self._num_taken
        if index == len(self._waiting):
            return False
        turn, number = self._waiting[index], self._num_arrived + 1
        if turn.chained and index:
            return False
        if turn.put is not None:
            if min(self._taken.tolist()) < number - 2:
                return False
            self._fence()
            turn.put(self._slots[number % 2][self._rank])
        self._fence()
        self._num_arrived = self._arrived[self._rank] = number
        return True

    def _take(self) -> bool:
        number = self._num_taken + 1
        if number > self._num_arrived or min(self._arrived.tolist()) < number:
            return False
        self._fence()
        self._waiting.popleft().take(self._slots[number % 2])
        self._fence()
        self._num_taken = self._taken[self._rank] = number
        return True

    def is_over(self, number: int) -> bool:
        """Return whether a turn is taken here and, if others read the caller's memory in it, by all."""
        if self._num_taken < number:
            return False
        if number in self._held:
            if min(self._taken.tolist()) < number:
                return False
            self._held.discard(number)
        return True

    def _fence(self) -> None:
        """Order all that was read and written before against all that comes after: a release, then an acquire."""
        for _ in range(2):
            with self._lock:
                pass


@dataclass(frozen=True)
class Ticket:
    """Stands for turns where an MPI request stands for a message."""

    lanes: Lanes
    last: int

    def Test(self, status: object = None) -> bool:
        """Go on; return whether the last turn is over."""
        self.lanes.advance()
        return self.lanes.is_over(self.last)


def open_lanes(comm: MPI.Intracomm, slot_bytes: int) -> Lanes | None:
    """Make the lanes of a group whose ranks are all on this host; all of them call. None: there is no room."""
    memory = map_together(comm, comm.size * _lane_bytes(slot_bytes))
    return None if memory is None else Lanes(memory, comm.rank, comm.size, slot_bytes)


def _lane_bytes(slot_bytes: int) -> int:
    return _HEAD_BYTES + 2 * slot_bytes


def map_together(comm: MPI.Intracomm, num_bytes: int) -> mmap.mmap | None:
    """Map a zeroed file that rank 0 makes and unlinks again; None for all ranks where one of them could not."""
    path = comm.bcast(_make_file(num_bytes) if comm.rank == 0 else None)
    memory = None
    if path is not None:
        try:
            with path.open("r+b") as file:
                memory = mmap.mmap(file.fileno(), num_bytes)
        except OSError:  # in a container with a folder of its own
            memory = None
    everyone = comm.allreduce(int(memory is not None), MPI.MIN)
    if path is not None and comm.rank == 0:
        path.unlink()  # the memory lives as long as somebody has it mapped
    return memory if everyone else None


def _make_file(num_bytes: int) -> Path | None:
    path = _FOLDER / f"mpi4py-backend-{uuid.uuid4().hex}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return None
    try:
        os.posix_fallocate(fd, 0, num_bytes)  # a full folder is found now, not by a bus error later
    except OSError:
        path.unlink()
        return None
    finally:
        os.close(fd)
    return path
