"""The control plane: small agreements between ranks, over MPI where there are several, torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from hpcpar.comm.mpi_patience import Patience
from hpcpar.comm.recorder import Recorder

# (the other rank, bytes to send or to fill)
Parcels = Sequence[tuple[int, memoryview]]
# a count of MPI has 31 bits
_MESSAGE_BYTES = 1 << 28


class Control(Protocol):
    """What rank 0 and the others tell each other; every rank of the communicator must call each method."""

    rank: int
    size: int
    recorder: Recorder | None  # is told of every call

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order. Cost: O(size) small messages in O(log size) rounds."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value."""
        ...

    def largest(self, value: int) -> int:
        """Return the largest of all ranks' integers: how ranks agree on a stop or a failed save."""
        ...

    def barrier(self) -> None:
        """Return when every rank has called."""
        ...

    def exchange(self, outgoing: Parcels, incoming: Parcels) -> None:
        """Send bytes to ranks and receive from ranks what they send here; of one rank, in its order."""
        ...


class Alone:
    """The control plane of a single process."""

    rank = 0
    size = 1
    recorder: Recorder | None = None

    def all_gather(self, value: Any) -> list[Any]:
        """Return the one value."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Return the value."""
        return value

    def largest(self, value: int) -> int:
        """Return the value."""
        return value

    def barrier(self) -> None:
        """Return at once."""

    def exchange(self, outgoing: Parcels, incoming: Parcels) -> None:
        """Return at once: there is nobody to send to."""
        assert not (outgoing or incoming)


class OverMPI:
    """The control plane of an mpi4py communicator (duplicated, so that its messages never mix with tensors')."""

    def __init__(self, communicator: Any):
        self._communicator = communicator.Dup()
        self.rank: int = communicator.Get_rank()
        self.size: int = communicator.Get_size()
        self.recorder: Recorder | None = None
        self._patience = Patience()

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order."""
        with self._recorded("gather_values"):
            gathered: list[Any] = self._communicator.allgather(value)
        return gathered

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value."""
        with self._recorded("broadcast_value"):
            return self._communicator.bcast(value, root=0)

    def largest(self, value: int) -> int:
        """Return the largest of all ranks' integers."""
        with self._recorded("largest_value"):
            gathered: list[int] = self._communicator.allgather(value)
        return max(gathered)

    def barrier(self) -> None:
        """Return when every rank has called."""
        with self._recorded("barrier"):
            self._communicator.Barrier()

    def exchange(self, outgoing: Parcels, incoming: Parcels) -> None:
        """Send bytes to ranks and receive from ranks what they send here; of one rank, in its order."""
        with self._recorded("exchange_bytes"):
            requests = [self._communicator.Irecv(part, rank) for rank, buffer in incoming for part in _parts(buffer)]
            requests += [self._communicator.Isend(part, rank) for rank, buffer in outgoing for part in _parts(buffer)]
            for request in requests:
                self._patience.wait(request.Test, math.inf, message=True)

    def _arrive(self) -> None:
        """Wait for the others asleep: MPI's own blocking calls spin, on cores that a late rank may need."""
        self._patience.wait(self._communicator.Ibarrier().Test, math.inf, message=True)

    @contextmanager
    def _recorded(self, operation: str) -> Iterator[None]:
        if self.recorder is None:
            self._arrive()
            yield
            return
        number = self.recorder.begin(self.recorder.group("control", range(self.size)), operation, 0)
        self.recorder.wait(number)
        self._arrive()
        yield
        self.recorder.end(number)  # not after an error: the call in which it came stays open


def _parts(buffer: memoryview) -> list[memoryview]:
    return [buffer[at : at + _MESSAGE_BYTES] for at in range(0, len(buffer), _MESSAGE_BYTES)]
