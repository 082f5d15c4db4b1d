"""Ranks of one host wake one another: part of `mpi_backend`.

A rank that looks again and again whether the others have come takes the cores on which they compute. Here it says in
memory that all have mapped that it sleeps, looks a last time, and waits on a socket; who brings what may end the wait
looks who sleeps, and sends those a byte. A byte that is missed costs no more than the sleep's longest time.

A message is brought by MPI itself, at once where a rank may read another's memory. Where it may not (Yama's
ptrace_scope, as Ubuntu sets it, and many containers), sender and receiver must look in turn for every few KiB, and
nobody rings between: `direct` tells which.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import time
import uuid
from collections.abc import Callable, Collection, Sequence

from mpi4py import MPI

from .mpi_memory import Fence, map_together

_LINE = 8  # words in a cache line
_PROBE_BYTES, _PROBE_S = 1 << 20, 0.25  # a message that no MPI library sends before it is asked for


class Bells:
    """One bell for each rank of a host."""

    def __init__(self, memory: mmap.mmap, own: socket.socket, index: int, addresses: Sequence[str]):
        self._asleep = memoryview(memory).cast("q")[:len(addresses) * _LINE:_LINE]
        self._own, self._index, self._addresses = own, index, addresses
        self._out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._out.setblocking(False)
        self._fence = Fence()
        self.direct = False  # whether long messages arrive while their sender sleeps; `probe` finds out

    def sleep(self, is_over: Callable[[], bool], longest_s: float) -> None:
        """Return when somebody rings, at the latest after `longest_s`, or at once if it is over by now."""
        self._asleep[self._index] = 1
        self._fence()
        if not is_over() and select.select([self._own], [], [], longest_s)[0]:
            self._own.recv(1)
        self._asleep[self._index] = 0

    def ring(self, indices: Collection[int]) -> None:
        """Wake those of these ranks that sleep; never waits."""
        self._fence()
        for index in indices:
            if self._asleep[index]:
                self._asleep[index] = 0  # once is enough
                self.send(index)

    def send(self, index: int) -> bool:
        """Send a byte; return whether it can arrive."""
        try:
            self._out.sendto(b"!", self._addresses[index])
        except BlockingIOError:  # enough bytes wait there
            return True
        except OSError:
            return False
        return True

    def drain(self) -> None:
        """Forget what has rung."""
        while select.select([self._own], [], [], 0)[0]:
            self._own.recv(1)

    def probe(self, comm: MPI.Comm) -> None:
        """Find out about `direct`, alike on all ranks of the host; all call, and nobody else rings meanwhile."""
        self.direct = bool(comm.allreduce(int(self._try_neighbour(comm)), MPI.MIN))

    def _try_neighbour(self, comm: MPI.Comm) -> bool:
        neighbour, arrived = self._index ^ 1, False
        if neighbour >= len(self._addresses):
            return True  # the others' answer counts
        data = bytearray(_PROBE_BYTES)
        if self._index < neighbour:
            request = comm.Isend(data, neighbour)
            arrived = bool(select.select([self._own], [], [], _PROBE_S)[0])  # meanwhile MPI is not called
            self.drain()
        else:
            request, until = comm.Irecv(data, neighbour), time.monotonic() + _PROBE_S
            while not arrived and time.monotonic() < until:
                arrived = request.Test()
                os.sched_yield()
            if arrived:
                self.send(neighbour)
        request.Wait()
        return arrived


def open_bells(comm: MPI.Comm) -> Bells | None:
    """Make the bells of the ranks of `comm`, all on this host; all of them call. None for all: ranks must look again.

    Linux's abstract socket names need no file and end with their process; other systems, and containers that do not
    share a network, have none.
    """
    memory = map_together(comm, comm.size * 8 * _LINE)
    name = comm.bcast(uuid.uuid4().hex)
    addresses = [f"\0mpi4py-backend-{name}-{rank}" for rank in range(comm.size)]
    own = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        own.bind(addresses[comm.rank])
        bound = memory is not None
    except OSError:
        bound = False
    if memory is None or not comm.allreduce(int(bound), MPI.MIN):
        own.close()
        return None
    bells = Bells(memory, own, comm.rank, addresses)
    reached = comm.allreduce(int(all(bells.send(rank) for rank in range(comm.size))), MPI.MIN)
    bells.drain()
    if not reached:
        return None
    bells.probe(comm)
    return bells
