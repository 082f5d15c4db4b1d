"""Messages between ranks of one host that may not read one another's memory: part of `mpi_backend`.

    outbox of a rank   | full | bytes | full | bytes | ...   blocks of a nameless file that grows
    sender     bytes into a block, full = 1, an MPI message of 32 bytes that says where
    receiver   that message, the bytes out of the block, full = 0

MPI would carry a long message in cells of a few KiB, and for each of them sender and receiver must both look. Here it
only decides which message meets which receive; the sender has nothing left to do: its send is over, unless so much
waits in its outbox that it shall wait too.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpi4py import MPI
from torch import Tensor

from .mpi_bells import Bells
from .mpi_buffers import as_bytes
from .mpi_memory import Fence

_LEAST_BYTES = 1 << 14  # of a block
_MAPPED_BYTES = 1 << 24  # at a time, for as many blocks as that is: each mapping keeps a descriptor open
_KEPT_BYTES = 1 << 28  # of empty blocks; others give their memory back: new pages take longer than a copy
_WAITING_BYTES = 1 << 28  # from here on a send is over when its message is received
_FULL_BYTES = 64  # a cache line for `full`
_WHERE = struct.Struct("<qqqq")  # the block's first byte and length, the message's bytes, whether its sender waits
_FILES = "/proc/{}/fd/{}"


class Block:
    """A part of an outbox that holds one message at a time."""

    def __init__(self, memory: mmap.mmap, start: int, length: int):
        """`start`: in the file; in the mapping it is where that of its length repeats."""
        self.start, self.length, self._memory = start, length, memory
        self.kept = False  # counted as memory that stays, when empty
        self.num_bytes = self.turn = 0  # of the message that was put last; how many were
        self._bytes = memoryview(memory)[start % len(memory):][:length]
        self._full = self._bytes[:8].cast("q")
        self._fence = Fence()

    @property
    def full(self) -> bool:
        """Whether a message waits for its receiver."""
        return bool(self._full[0])

    def put(self, data: memoryview) -> None:
        """Fill the block, which must be empty."""
        self._fence()
        self._bytes[_FULL_BYTES:_FULL_BYTES + len(data)] = data
        self._full[0] = 1
        self.num_bytes, self.turn = len(data), self.turn + 1
        self._fence()

    def take(self, data: memoryview) -> None:
        """Empty the block; copy what it holds into `data` as far as that goes."""
        self._fence()
        data[:] = self._bytes[_FULL_BYTES:_FULL_BYTES + len(data)]
        self._fence()
        self._full[0] = 0

    def forget(self) -> None:
        """Give the memory of an empty block back to the system until it is used again."""
        self._memory.madvise(mmap.MADV_REMOVE, self.start % len(self._memory), self.length)


class Outbox:
    """This rank's blocks; their lengths are powers of two, so that they fit again and lie where a mapping may begin."""

    def __init__(self) -> None:
        self._file, self._end = os.memfd_create("mpi4py-backend-outbox"), 0
        self._lent: list[Block] = []
        self._free: dict[int, list[Block]] = {}  # by length
        self._fresh: dict[int, Iterator[Block]] = {}  # mapped and never lent, by length
        self._kept_bytes = 0

    @property
    def name(self) -> tuple[str, int]:
        """Where another process finds the file, and its inode, to know it by."""
        return _FILES.format(os.getpid(), self._file), os.fstat(self._file).st_ino

    @property
    def waiting_bytes(self) -> int:
        """Bytes of messages that are not known to be received."""
        return sum(block.num_bytes for block in self._lent)

    def put(self, data: memoryview) -> Block:
        """Copy a message into an empty block."""
        self._take_back()
        length = 1 << (max(_FULL_BYTES + len(data), _LEAST_BYTES) - 1).bit_length()  # untouched pages take no memory
        free = self._free.setdefault(length, [])
        block = free.pop() if free else next(self._fresh.get(length, iter(())), None) or self._grow(length)
        self._kept_bytes -= length * block.kept
        self._lent.append(block)
        block.put(data)
        return block

    def _take_back(self) -> None:
        lent, self._lent = self._lent, []
        for block in lent:
            if block.full:
                self._lent.append(block)
                continue
            block.kept = self._kept_bytes + block.length <= _KEPT_BYTES
            if block.kept:
                self._kept_bytes += block.length
                self._free[block.length].append(block)
            else:
                block.forget()
                self._free[block.length].insert(0, block)  # the last to be used again

    def _grow(self, length: int) -> Block:
        start, self._end = part_of(self._end + max(length, _MAPPED_BYTES) - 1, length)
        os.ftruncate(self._file, self._end)
        memory = mmap.mmap(self._file, self._end - start, offset=start)
        self._fresh[length] = (Block(memory, at, length) for at in range(start, self._end, length))
        return next(self._fresh[length])

    def close(self) -> None:
        """Let go of the file where it is of no use."""
        os.close(self._file)


def part_of(byte: int, length: int) -> tuple[int, int]:
    """Return first and last byte (exclusive) of what is mapped of an outbox for a block of this length with `byte`."""
    mapped = max(length, _MAPPED_BYTES)
    start = byte // mapped * mapped
    return start, start + mapped


class Mail:
    """The outboxes of a host's ranks, and the messages that this rank waits for."""

    def __init__(self, own: Outbox, files: Mapping[int, str], places: Mapping[int, int], bells: Bells | None):
        """`files`, and places among the `bells`: by rank of the world."""
        self.files, self._own, self._places, self._bells = files, own, places, bells
        self._parts: dict[tuple[int, int], mmap.mmap] = {}  # of others' outboxes, by rank and first byte
        self._expected: set[Incoming] = set()

    def progress(self) -> None:
        """Receive what is there: a sender may wait for that, though this rank waits for something else."""
        for incoming in list(self._expected):
            incoming.advance()

    def send(self, comm: MPI.Intracomm, flat: Tensor, rank: int, tag: int) -> Outgoing:
        """Send a flat tensor, which may be written again at once, to a rank of `comm` that is on this host."""
        block = self._own.put(memoryview(as_bytes(flat)))
        waits = self._own.waiting_bytes > _WAITING_BYTES
        where = _WHERE.pack(block.start, block.length, flat.nbytes, waits)
        return Outgoing(comm.Isend(where, rank, tag), where, block if waits else None, block.turn)

    def receive(self, comm: MPI.Intracomm, ranks: Sequence[int], flat: Tensor, source: int, tag: int) -> Incoming:
        """Await a message from a rank of this host or from anyone; `ranks`: of the world, by rank of `comm`."""
        incoming = Incoming(self, comm, ranks, flat, source, tag)
        self._expected.add(incoming)
        return incoming

    def take(self, source: int, where: bytes | bytearray, data: memoryview) -> None:
        """Copy a message of a rank of the world into `data`. Raises: ValueError for one that is too long."""
        start, length, num_bytes, waits = _WHERE.unpack(where)
        first, end = part_of(start, length)
        part = self._parts.get((source, first))
        if part is None:
            with Path(self.files[source]).open("r+b") as file:
                part = self._parts[source, first] = mmap.mmap(file.fileno(), end - first, offset=first)
        Block(part, start, length).take(data[:num_bytes])
        if waits and self._bells:
            self._bells.ring((self._places[source],))
        must_have_room(source, num_bytes, data)

    def forget(self, incoming: Incoming) -> None:
        """Await a message no more."""
        self._expected.discard(incoming)


def must_have_room(source: int, num_bytes: int, data: memoryview) -> None:
    """Raise ValueError for a message that is longer than its receive."""
    if num_bytes > len(data):
        raise ValueError(f"rank {source} sent {num_bytes} bytes where the receive has room for {len(data)}")


@dataclass
class Outgoing:
    """Stands for a message that is sent where an MPI request stands for one."""

    request: MPI.Request
    where: bytes  # MPI reads it until the request is complete
    block: Block | None  # to be empty before the send is over
    turn: int  # of the block; it may have another message by now

    def Test(self, status: object = None) -> bool:
        """Return whether the send is over."""
        waits = self.block is not None and self.block.turn == self.turn and self.block.full
        return self.request.Test() and not waits


class Incoming:
    """Stands for a message that is awaited, from a rank of this host or from anyone."""

    def __init__(self, mail: Mail, comm: MPI.Intracomm, ranks: Sequence[int], flat: Tensor, source: int, tag: int):
        self._mail, self._ranks, self._data = mail, ranks, memoryview(as_bytes(flat))
        # one from elsewhere comes whole, and who it is from is known when it is here
        self._here = bytearray(_WHERE.size if source >= 0 else max(_WHERE.size, flat.nbytes))
        self._request, self._status = comm.Irecv(self._here, source, tag), MPI.Status()
        self._over = False
        self._error: Exception | None = None

    def Test(self, status: MPI.Status | None = None) -> bool:
        """Return whether the message is here, and its source in `status`. Raises: ValueError if it is too long."""
        over = self.advance()
        if self._error:
            raise self._error
        if over and status is not None:
            status.Set_source(self._status.Get_source())
        return over

    def advance(self) -> bool:
        """Take the message if it is there; return whether that is done, well or not."""
        if self._over:
            return True
        try:
            if not self._request.Test(self._status):
                return False
            self._receive(self._ranks[self._status.Get_source()])
        except (MPI.Exception, OSError, ValueError) as error:  # is told where this message is waited for
            self._error = error
        self._over = True
        self._mail.forget(self)
        return True

    def _receive(self, source: int) -> None:
        if source in self._mail.files:
            self._mail.take(source, self._here[:_WHERE.size], self._data)
            return
        num_bytes = self._status.Get_count(MPI.BYTE)
        self._data[:num_bytes] = memoryview(self._here)[:min(num_bytes, len(self._data))]
        must_have_room(source, num_bytes, self._data)


def open_mail(comm: MPI.Comm, ranks: Mapping[int, int], bells: Bells | None) -> Mail | None:
    """Make the outboxes of the ranks of `comm`, all on this host; all of them call.

    `ranks`: of the world, with their places in `comm`. None for all where one cannot open another's file: other
    systems, and containers that do not share processes.
    """
    try:
        own = Outbox()
    except (AttributeError, OSError):  # not Linux; or forbidden
        own = None
    names = comm.allgather(own and own.name)
    found = all(name is not None and _is_there(*name) for name in names)
    if comm.allreduce(int(found), MPI.MIN) and own:
        return Mail(own, {rank: names[place][0] for rank, place in ranks.items()}, ranks, bells)
    if own:
        own.close()
    return None


def _is_there(path: str, inode: int) -> bool:
    """Return whether a file can be opened and is the one that is meant, not one of a namesake in another container."""
    try:
        with Path(path).open("r+b") as file:
            return os.fstat(file.fileno()).st_ino == inode
    except OSError:
        return False
