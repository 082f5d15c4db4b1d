"""Messages between ranks of one host, through memory of the sender: part of `mpi_backend`.

    outbox of a rank   | full | bytes | full | bytes | ...   blocks of a nameless file that grows
    sender     bytes into a block, full = 1, an MPI message of 24 bytes that says where
    receiver   that message, the bytes out of the block, full = 0: the sender is done

MPI still decides which message meets which receive, and short ones it delivers at once. Long ones it delivers well only
where a rank may read another's memory; elsewhere (Yama's ptrace_scope, as Ubuntu sets it, and many containers) sender
and receiver must both look for every few KiB. Here nothing is left to do for a sender that computes or sleeps.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mpi4py import MPI
from torch import Tensor

from .mpi_bells import Bells
from .mpi_buffers import as_bytes
from .mpi_memory import Fence

_LEAST_BYTES = 1 << 14  # of a block
_MAPPED_BYTES = 1 << 24  # at a time, for as many blocks as that is: each mapping keeps a descriptor open
_KEPT_BYTES = 1 << 26  # the memory of a longer block goes back to the system with its message: new pages take time
_FULL_BYTES = 64  # a cache line for `full`
_WHERE = struct.Struct("<qqq")  # the block's first byte and length, the message's bytes
_FILES = "/proc/{}/fd/{}"


class Block:
    """A part of an outbox that holds one message at a time."""

    def __init__(self, memory: mmap.mmap, start: int, length: int):
        """`start`: in the file; in the mapping it is where that of its length repeats."""
        self.start, self.length, self._memory = start, length, memory
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
        self._free: dict[int, list[Block]] = {}  # by length
        self._fresh: dict[int, Iterator[Block]] = {}  # mapped and never lent, by length

    @property
    def name(self) -> tuple[int, int, int]:
        """What another process needs to find the file: process, descriptor, and inode to know it by."""
        return os.getpid(), self._file, os.fstat(self._file).st_ino

    def lend(self, num_bytes: int) -> Block:
        """Return an empty block for a message."""
        length = 1 << (max(_FULL_BYTES + num_bytes, _LEAST_BYTES) - 1).bit_length()  # untouched pages take no memory
        free = self._free.setdefault(length, [])
        return free.pop() if free else next(self._fresh.get(length, iter(())), None) or self._grow(length)

    def _grow(self, length: int) -> Block:
        start, self._end = part_of(self._end + max(length, _MAPPED_BYTES) - 1, length)
        os.ftruncate(self._file, self._end)
        memory = mmap.mmap(self._file, self._end - start, offset=start)
        self._fresh[length] = (Block(memory, at, length) for at in range(start, self._end, length))
        return next(self._fresh[length])

    def give_back(self, block: Block) -> None:
        """Take back what is empty again."""
        if block.length > _KEPT_BYTES:
            block.forget()
        self._free[block.length].append(block)


def part_of(byte: int, length: int) -> tuple[int, int]:
    """Return first and last byte (exclusive) of what is mapped of an outbox for a block of this length with `byte`."""
    mapped = max(length, _MAPPED_BYTES)
    start = byte // mapped * mapped
    return start, start + mapped


@dataclass(frozen=True)
class Mail:
    """The outboxes of a host's ranks, by rank of the world, and what this rank waits to receive."""

    own: Outbox
    files: Mapping[int, int]  # descriptors here
    places: Mapping[int, int]  # among the bells
    bells: Bells | None
    parts: dict[tuple[int, int], mmap.mmap] = field(default_factory=dict)  # of others, by rank and first byte
    expected: set[Incoming] = field(default_factory=set)

    def progress(self) -> None:
        """Receive what is there: a sender may wait until it is taken, though this rank waits for something else."""
        for incoming in list(self.expected):
            incoming.Test()

    def send(self, comm: MPI.Intracomm, flat: Tensor, rank: int, tag: int) -> Outgoing:
        """Send a flat tensor to a rank of `comm` that is on this host."""
        block = self.own.lend(flat.nbytes)
        block.put(memoryview(as_bytes(flat)))
        where = _WHERE.pack(block.start, block.length, flat.nbytes)
        return Outgoing(self.own, block, comm.Isend(where, rank, tag), where)

    def take(self, source: int, where: bytes, data: memoryview) -> None:
        """Copy a message of a rank of the world into `data`."""
        start, length, num_bytes = _WHERE.unpack(where)
        first, end = part_of(start, length)
        part = self.parts.get((source, first))
        if part is None:
            part = self.parts[source, first] = mmap.mmap(self.files[source], end - first, offset=first)
        Block(part, start, length).take(data[:num_bytes])
        if self.bells:  # it may wait until this is taken
            self.bells.ring((self.places[source],))
        if num_bytes > len(data):
            raise ValueError(f"rank {source} sent {num_bytes} bytes where the receive has room for {len(data)}")


@dataclass
class Outgoing:
    """Stands for a message that is sent where an MPI request stands for one."""

    outbox: Outbox
    block: Block
    request: MPI.Request
    where: bytes  # MPI reads it until the request is complete

    def Test(self, status: object = None) -> bool:
        """Return whether the receiver has the message."""
        if self.block.full or not self.request.Test():
            return False
        self.outbox.give_back(self.block)
        return True


class Incoming:
    """Stands for a message that is awaited, from a rank of this host or from anyone."""

    def __init__(self, mail: Mail, comm: MPI.Intracomm, ranks: Any, flat: Tensor, source: int, tag: int):
        """`ranks`: of the world, by rank of `comm`."""
        self._mail, self._ranks, self._data = mail, ranks, memoryview(as_bytes(flat))
        # one from elsewhere comes whole, and who it is from is known when it is here
        self._here = self._data if len(self._data) >= _WHERE.size else memoryview(bytearray(_WHERE.size))
        self._request: MPI.Request | None = comm.Irecv(self._here, source, tag)
        self._status = MPI.Status()
        mail.expected.add(self)

    def Test(self, status: MPI.Status | None = None) -> bool:
        """Take the message if it is there; return whether it is."""
        if self._request is not None and self._request.Test(self._status):
            self._request = None
            self._mail.expected.discard(self)
            self._receive(self._ranks[self._status.Get_source()])
        if self._request is None and status is not None:
            status.Set_source(self._status.Get_source())
        return self._request is None

    def _receive(self, source: int) -> None:
        if source in self._mail.files:
            self._mail.take(source, bytes(self._here[:_WHERE.size]), self._data)
        elif self._here is not self._data:
            self._data[:] = self._here[:len(self._data)]


def open_mail(comm: MPI.Comm, ranks: Mapping[int, int], bells: Bells | None) -> Mail | None:
    """Make the outboxes of the ranks of `comm`, all on this host; all of them call.

    `ranks`: of the world, with their places in `comm`. None for all where one cannot open another's file: other
    systems, and containers that do not share processes.
    """
    own = Outbox() if hasattr(os, "memfd_create") else None
    names = comm.allgather(own and own.name)
    files = {rank: _open(*names[place]) if names[place] else None for rank, place in ranks.items()}
    opened = {rank: file for rank, file in files.items() if file is not None}
    everyone = comm.allreduce(int(own is not None and len(opened) == len(ranks)), MPI.MIN)
    return Mail(own, opened, ranks, bells) if own is not None and everyone else None


def _open(process: int, descriptor: int, inode: int) -> int | None:
    try:
        file = os.open(_FILES.format(process, descriptor), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(file).st_ino == inode:
        return file
    os.close(file)  # another process of that number, in a container
    return None
