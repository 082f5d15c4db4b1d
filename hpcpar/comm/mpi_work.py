"""An operation in flight, and who is told of it: part of `mpi_backend`."""

# ruff: noqa: D102 - the operations are torch's, and so are their descriptions
# mypy: disable-error-code="override, assignment, call-arg"
# torch's stubs know one of several accepted signatures, and not the same one in every version.
from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from .mpi_bells import Bells
from .mpi_lanes import Lanes, Ticket
from .mpi_outbox import Incoming, Mail, Outgoing
from .mpi_patience import Patience

# A request in flight, what is left to do once it is complete, and its buffers: mpi4py does not keep a tensor's memory
# alive until then (seen on Open MPI: a copy freed too early is sent as whatever was allocated in its place).
Step = tuple[MPI.Request | Ticket | Outgoing | Incoming, Callable[[], object] | None, object]


class Observer(Protocol):
    """Is told of every operation: a flight recorder, a counter of bytes."""

    def group(self, name: str, ranks: Sequence[int]) -> int:
        """Return the number by which `begin` is told of a group of global ranks."""

    def begin(self, group: int, operation: str, num_bytes: int, peer: int = -1) -> int:
        """Note that an operation was started; return its number. `peer`: the other global rank of a message."""

    def wait(self, number: int) -> None:
        """Note that the rank now waits for an operation."""

    def end(self, number: int) -> None:
        """Note that an operation is complete."""


class Nobody:
    """An observer that looks away."""

    def group(self, name: str, ranks: Sequence[int]) -> int:
        return 0

    def begin(self, group: int, operation: str, num_bytes: int, peer: int = -1) -> int:
        return 0

    def wait(self, number: int) -> None: ...

    def end(self, number: int) -> None: ...


@dataclass(frozen=True)
class Home:
    """What the groups of a process have in common."""

    world: MPI.Intracomm
    on_host: Mapping[int, int]  # ranks of `world` that share memory with this one, and their indices there
    bells: Bells | None  # by these indices
    mail: Mail | None  # for messages between them, where MPI carries those badly
    patience: Patience
    observer: Observer
    lanes: list[Lanes] = field(default_factory=list)  # of all groups that have any
    unrung: set[MPIWork] = field(default_factory=set)  # not seen complete, and nobody rings for all of it

    def subset(self, ranks: Sequence[int], group_id: str) -> MPI.Intracomm:
        """Make the communicator of `ranks`, which alone call this; the tag keeps groups made at the same time apart."""
        tag = zlib.crc32(group_id.encode()) % (self.world.Get_attr(MPI.TAG_UB) or 32767)
        everyone = self.world.Get_group()
        members = everyone.Incl(ranks)
        try:
            return self.world.Create_group(members, tag)
        finally:
            members.Free()
            everyone.Free()

    def progress(self) -> None:
        """Go on with whatever is in flight elsewhere than in what this rank waits for."""
        for lanes in self.lanes:
            lanes.advance()
        if self.mail:
            self.mail.progress()
        self.world.Iprobe()  # MPI goes on in every call

    def ring(self, indices: Collection[int]) -> None:
        """Wake those of these ranks of the host that sleep."""
        if self.bells:
            self.bells.ring(indices)

    def ring_rank(self, rank: int) -> None:
        """Wake a rank of `world` if it sleeps on this host."""
        if rank in self.on_host:
            self.ring((self.on_host[rank],))


class MPIWork(dist.Work):
    """One or more MPI requests, the buffers they use, and what is to be done when they are complete.

    get_future() completes it at once: MPI calls nobody back, so that nothing could fulfil a future later.
    """

    def __init__(self, steps: list[Step], outputs: list[Tensor], home: Home, timeout: timedelta,
                 in_flight: set[MPIWork], number: int, peer: int):
        """`number`: the observer's. `peer`: the other global rank of a message, -1 for a collective."""
        super().__init__()
        self._home, self._number, self._peer = home, number, peer
        self._steps, self._requests = steps, [step[0] for step in steps]
        self._outputs, self._timeout, self._in_flight = outputs, timeout, in_flight
        in_lanes = all(isinstance(request, Ticket) for request in self._requests)
        from_here = peer in home.on_host and peer != home.world.rank  # one's own rank stands for anyone
        self._bells = home.bells if in_lanes or from_here else None
        if self._bells is None or not (in_lanes or home.mail or self._bells.direct):
            home.unrung.add(self)
        self._status = MPI.Status()
        in_flight.add(self)  # until complete: a caller may drop this object, the buffers must outlive the request

    @property
    def is_collective(self) -> bool:
        """Whether the whole group takes part."""
        return self._peer < 0

    def test(self) -> bool:
        """Return whether the operation is complete, finishing it if it just became so."""
        if not self._requests:
            return True
        try:
            self._requests = [request for request in self._requests if not request.Test(self._status)]
        except Exception:
            self._land()
            raise
        if self._requests:
            return False
        for _, finish, _ in self._steps:
            if finish is not None:
                finish()
        self._steps = []
        self._land()
        self._home.observer.end(self._number)
        if not self._home.mail:  # MPI tells the sender now that its message is received
            self._home.ring_rank(self._peer)
        return True

    def _land(self) -> None:
        """Be in flight no more."""
        self._in_flight.discard(self)
        self._home.unrung.discard(self)

    def is_completed(self) -> bool:
        """Return whether the operation is complete; if not, go on with the others, as MPI does in each of its calls."""
        if self.test():
            return True
        self._home.progress()
        return self.test()  # that may have brought it

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Complete the operation; raise TimeoutError after `timeout` (0: the group's)."""
        if not self._requests:  # torch waits again for what was waited for here
            return True
        self._home.observer.wait(self._number)
        timeout_s = (timeout or self._timeout).total_seconds()
        self._home.patience.wait(self.is_completed, timeout_s, self._peer >= 0, self._bells, bool(self._home.unrung))
        return True

    def synchronize(self) -> None:
        self.wait()

    def result(self) -> list[Tensor]:
        self.wait()
        return self._outputs

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        future.set_result(self.result())
        return future

    def source_rank(self) -> int:
        return self._status.Get_source()

    _source_rank = source_rank
