"""Turns of ranks on one host in memory that all of them have mapped: part of `mpi_backend`.

    lane of a rank   | arrived | taken | meanings | words | slot 0 | slot 1 |   lane after lane in a nameless file

    turn n of a rank     put its bytes into slot n % 2 of its lane (once all have taken turn n - 2);  arrived = n
                         once all have arrived at n: copy or sum out of the others' slots;            taken = n

A turn that does not mean the same to all ranks (one skipped a collective) never ends: better a hang, which is found and
explained, than wrong numbers.

With its arrival a rank may leave a word: `agreed` is what the words of all, as of one turn, have in common.

MPI needs log(size) to size rounds for a collective, and a copy in each; with more ranks than cores every round waits
for the scheduler. Here it is one round.

Memory order: the counters are plain 8-byte words; a `Fence` keeps data and counter in order on every processor.
"""

from __future__ import annotations

import mmap
import operator
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from mpi4py import MPI
from torch import Tensor

from .mpi_memory import Fence, map_together

Ring = Callable[[Sequence[int]], None]  # wakes those of these ranks of the group that sleep
_HEAD_BYTES, _LINE = 256, 8  # a cache line for each counter, for the meanings and the words; words in a line


@dataclass
class Turn:
    """What a rank does in one turn."""

    put: Callable[[Tensor], object] | None  # its bytes into its slot; None: the others need none
    take: Callable[[list[Tensor]], object]  # what it wants out of all ranks' slots
    chained: bool = False  # what it puts there is what the turn before took
    held: bool = False  # the others read the caller's own memory: over when all have taken
    meaning: int = 0  # what it must mean to all


def _nobody(ranks: Sequence[int]) -> None:
    """Wake nobody: the others look by themselves."""


def _no_bits() -> int:
    """Leave nothing."""
    return 0


class Lanes:
    """A group's lanes, and the turns that this rank has begun; all ranks begin the same ones in one order."""

    def __init__(self, memory: mmap.mmap, rank: int, size: int, slot_bytes: int, ring: Ring = _nobody):
        self._rank, self.slot_bytes, self._ring = rank, slot_bytes, ring
        lane = lane_bytes(slot_bytes)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        starts = [r * lane + _HEAD_BYTES for r in range(size)]
        self._slots = [[whole[s + n * slot_bytes:s + (n + 1) * slot_bytes] for s in starts] for n in (0, 1)]
        words = memoryview(memory).cast("q")
        self._arrived, self._taken = words[0::lane // 8], words[_LINE::lane // 8]
        self._meanings = [words[2 * _LINE + n::lane // 8] for n in range(_LINE)]  # of turns n, n + 8, ...
        self._words = [words[3 * _LINE + n::lane // 8] for n in range(_LINE)]
        self.word: Callable[[], int] = _no_bits  # what this rank leaves with its next arrival
        self.agreed = 0  # the bits that all ranks' words of the last turn taken have
        self._num_begun = self._num_arrived = self.num_taken = 0
        self._waiting: deque[Turn] = deque()  # not yet taken, the oldest first
        self._held: set[int] = set()  # numbers of turns that are over when all have taken
        self._fence = Fence()

    def begin(self, meaning: str, turns: Sequence[Turn]) -> Ticket:
        """Start turns, as far as they go without waiting; they end if `meaning` is equal on all ranks."""
        for turn in turns:
            turn.meaning = zlib.crc32(meaning.encode())
            self._num_begun += 1
            self._waiting.append(turn)
            if turn.held:
                self._held.add(self._num_begun)
        self.advance()
        return Ticket(self, self._num_begun)

    def advance(self) -> None:
        """Go on with what has begun as far as that goes without waiting."""
        while self._waiting and (self._arrive() or self._take()):
            pass

    def _arrive(self) -> bool:
        if self._num_arrived == self._num_begun:
            return False
        index, number = self._num_arrived - self.num_taken, self._num_arrived + 1
        turn = self._waiting[index]
        if turn.chained and index:
            return False
        if min(self._taken.tolist()) < number - (2 if turn.put else _LINE):  # others still need what is there
            return False
        self._fence()
        self._meanings[number % _LINE][self._rank] = turn.meaning
        self._words[number % _LINE][self._rank] = self.word()
        if turn.put is not None:
            turn.put(self._slots[number % 2][self._rank])
        self._fence()
        self._num_arrived = self._arrived[self._rank] = number
        self._fence()  # of two that come last, one must see it
        if min(self._arrived.tolist()) >= number:
            self._wake(number)
        return True

    def _take(self) -> bool:
        number = self.num_taken + 1
        if number > self._num_arrived or min(self._arrived.tolist()) < number:
            return False
        self._fence()
        if len(set(self._meanings[number % _LINE].tolist())) > 1:
            return False
        self.agreed = reduce(operator.and_, self._words[number % _LINE].tolist())
        self._waiting.popleft().take(self._slots[number % 2])
        self._fence()
        self.num_taken = self._taken[self._rank] = number
        self._fence()
        self._wake(number)
        return True

    def _wake(self, number: int) -> None:
        """Ring for those that can take a turn and have not; once all have, for all who wait for that.

        Everyone who takes it rings: the first that wakes may push who woke it off its core before the others are rung.
        """
        taken = self._taken.tolist()
        late = [rank for rank, turn in enumerate(taken) if turn < number]
        self._ring([rank for rank in late or range(len(taken)) if rank != self._rank])

    def is_over(self, number: int) -> bool:
        """Return whether a turn is taken here and, if others read the caller's memory in it, by all."""
        if self.num_taken < number:
            return False
        if number in self._held:
            if min(self._taken.tolist()) < number:
                return False
            self._held.discard(number)
        return True


@dataclass(frozen=True)
class Ticket:
    """Stands for turns where an MPI request stands for a message."""

    lanes: Lanes
    last: int

    def Test(self, status: object = None) -> bool:
        """Go on; return whether the last turn is over."""
        self.lanes.advance()
        return self.lanes.is_over(self.last)


def open_lanes(comm: MPI.Intracomm, slot_bytes: int, ring: Ring) -> Lanes | None:
    """Make the lanes of a group whose ranks are all on this host; all of them call. None: there is no room.

    `ring` is called with the ranks for which there may be what they wait for.
    """
    memory = map_together(comm, comm.size * lane_bytes(slot_bytes))
    return None if memory is None else Lanes(memory, comm.rank, comm.size, slot_bytes, ring)


def lane_bytes(slot_bytes: int) -> int:
    """Return the bytes of one rank's lane."""
    return _HEAD_BYTES + 2 * slot_bytes
