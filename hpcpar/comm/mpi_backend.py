"""A torch.distributed backend over mpi4py; it knows nothing of the rest of this project.

CPU tensors go from where they lie; those of GPUs by way of the host, which lets ranks share one ("cuda:mpi4py").

    mpi_backend.register()
    dist.init_process_group("cpu:mpi4py", store=store, rank=MPI.COMM_WORLD.rank, world_size=MPI.COMM_WORLD.size)
    group = dist.new_group([0, 2], use_local_synchronization=True)      # called by ranks 0 and 2 only

Importing this module starts MPI. torch's global rank must be the rank in the communicator given to `register`
(MPI.COMM_WORLD unless told otherwise); every rank checks its own place when a group is made.

Private or undocumented parts of torch that this leans on (tested on torch 2.11 and 2.13):
- a `ProcessGroup` subclass returned by a registered creator takes the place of the whole group, so that a mixed
  "cpu:mpi4py,cuda:nccl" group is not possible: make two. `_register_backend(cpu, CUSTOM, None)` names the device.
- overridden on ProcessGroup: `_allgather_base`, `_reduce_scatter_base`, `allgather_into_tensor_coalesced`,
  `reduce_scatter_tensor_coalesced`, `alltoall_base` (2.13 calls them `all_gather_single`, `reduce_scatter_single`,
  `..._single_coalesced`, `all_to_all_single`; both names are here), `recv_anysource`, `getBackendName`,
  `getGroupName`, `_set_group_name`, `getGroupDesc`, `_set_group_desc` and the properties that read them.
- overridden on Work: `_source_rank`, `get_future`.

Rules that callers keep: all ranks of a group call its collectives in the same order; a tensor is not touched before
its work is waited for; one thread at a time calls. The same call gives the same bits in every run with the same MPI
library.

Groups whose ranks are all on one host do the collectives that training is made of in shared memory (`mpi_shared`);
`MPIProcessGroup.shared` gives memory in which they copy nothing at all. Messages between ranks of a host that may not
read one another's memory go through the sender's outbox (`mpi_outbox`). Everything else is MPI's.
"""

# ruff: noqa: D102 - the operations are torch's, and so are their descriptions
# mypy: disable-error-code="override, assignment, call-arg"
# torch's stubs know one of several accepted signatures, and not the same one in every version.
from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from .mpi_bells import open_bells
from .mpi_buffers import (
    as_bytes,
    cut,
    flatten,
    for_reduction,
    must_fit,
    must_reduce,
    overlap,
    parts,
    receive_into,
    send_from,
    store,
)
from .mpi_outbox import open_mail
from .mpi_patience import Patience
from .mpi_shared import OneHost
from .mpi_work import Home, MPIWork, Nobody, Observer, Step
from .named_group import NamedGroup

_MAX_UNWAITED = 64
DEVICES = ("cpu", "cuda")  # a GPU's tensors travel through the host's memory, copied before a call and after its wait


def register(name: str = "mpi4py", comm: MPI.Intracomm | None = None, patience: Patience | None = None,
             observer: Observer | None = None) -> None:
    """Make `name` known to torch.distributed as a backend for CPU tensors; a second call with that name does nothing.

    Rank i of torch's default group is rank i of `comm` (MPI.COMM_WORLD by default); all its ranks must call.
    """
    if hasattr(dist.Backend, name.upper()):
        return
    world = comm or MPI.COMM_WORLD
    neighbours = world.Split_type(MPI.COMM_TYPE_SHARED, key=world.rank)
    on_host = {rank: index for index, rank in enumerate(neighbours.allgather(world.rank))}
    bells = open_bells(neighbours)
    mail = None if bells and bells.direct else open_mail(neighbours, on_host, bells)
    home = Home(world, on_host, bells, mail, patience or Patience(), observer or Nobody())
    neighbours.Free()

    def create(options: Any, pg_options: object) -> MPIProcessGroup:
        ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
        if ranks[options.group_rank] != world.rank:
            raise ValueError(
                f"torch global rank {ranks[options.group_rank]} is rank {world.rank} of the MPI communicator; "
                "start torch.distributed with rank=comm.rank, or register with a communicator in torch's order"
            )
        return MPIProcessGroup(home.subset(ranks, options.group_id), name, options.timeout, home, ranks)

    dist.Backend.register_backend(name, create, extended_api=True, devices=[*DEVICES])


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class MPIProcessGroup(NamedGroup):
    """A process group whose operations are MPI's on `comm`, which it owns and frees in `shutdown()`.

    Every operation starts a non-blocking one and returns its `MPIWork`, already complete if `asyncOp` is off in the
    options. Contiguous tensors are used where they lie; others, and 16-bit floats in MPI's reductions, through a copy.
    """

    def __init__(self, comm: MPI.Intracomm, name: str, timeout: timedelta, home: Home, ranks: Sequence[int]):
        super().__init__(comm.rank, comm.size, name, DEVICES)
        self._comm, self._timeout, self._home = comm, timeout, home
        self._ranks, self._number = ranks, -1
        self._host = None
        if len(ranks) > 1 and home.on_host.keys() >= set(ranks):
            here = [home.on_host[rank] for rank in ranks]
            self._host = OneHost(comm, home.lanes, lambda late: home.ring([here[rank] for rank in late]))
        self._in_flight: set[MPIWork] = set()

    def _work(self, operation: str, num_bytes: int, steps: list[Step], outputs: list[Tensor], opts: Any = None,
              peer: int | None = None) -> MPIWork:
        if self._number < 0:  # now, not when the group was made: torch names it later
            self._number = self._home.observer.group(self._group_desc or self._group_name, self._ranks)
        other = -1 if peer is None else self._global(peer)
        number = self._home.observer.begin(self._number, operation, num_bytes, other)
        if len(self._in_flight) >= _MAX_UNWAITED:  # someone never waits for sends: let go of the complete ones
            for work in list(self._in_flight):
                with suppress(ValueError):  # of a message that is too long: told where that is awaited
                    work.test()
        work = MPIWork(steps, outputs, self._home, self._timeout, self._in_flight, number, other)
        if opts is not None and not opts.asyncOp:
            work.wait()
        return work

    def _global(self, rank: int) -> int:
        return self._ranks[rank if rank >= 0 else self.rank()]  # a message from anyone is told as one from oneself

    # -- one tensor in, one tensor out: the steps that the operations below are made of

    def _allreduce_step(self, tensor: Tensor, op: dist.ReduceOp) -> Step:
        must_reduce(tensor, op)
        flat = flatten(tensor)
        if self._host and (ticket := self._host.all_reduce(flat, op)):
            return ticket, lambda: store(tensor, flat), flat
        flat, mpi_op = for_reduction(tensor, op)
        request = self._comm.Iallreduce(MPI.IN_PLACE, flat.numpy(), mpi_op)
        return request, lambda: store(tensor, flat, op, self.size()), flat

    def _allgather_step(self, output: Tensor, source: Tensor) -> Step:
        out, piece = flatten(output), flatten(source)
        must_fit(output, source, self.size())
        in_place = piece.data_ptr() == out.data_ptr() + self.rank() * piece.nbytes
        if overlap(piece, out) and not in_place:
            piece = piece.clone()
        if self._host and (ticket := self._host.all_gather(out, piece)):
            return ticket, lambda: store(output, out), (piece, out)
        send: Any = MPI.IN_PLACE if in_place else as_bytes(piece)
        return self._comm.Iallgather(send, as_bytes(out)), lambda: store(output, out), (piece, out)

    def _reduce_scatter_step(self, output: Tensor, source: Tensor, op: dist.ReduceOp) -> Step:
        must_reduce(source, op)
        must_fit(source, output, self.size())
        out = flatten(output)
        pieces = flatten(source)
        if overlap(out, pieces) and out.data_ptr() != pieces.data_ptr() + self.rank() * out.nbytes:
            out = torch.empty_like(out)  # elsewhere in the source: others may still read what lies there
        if self._host and (ticket := self._host.reduce_scatter(out, pieces, op)):
            return ticket, lambda: store(output, out), (pieces, out)
        pieces, mpi_op = for_reduction(source, op)
        if out.dtype != pieces.dtype or overlap(out, pieces):
            out = torch.empty(output.numel(), dtype=pieces.dtype)
        request = self._comm.Ireduce_scatter_block(pieces.numpy(), out.numpy(), mpi_op)
        return request, lambda: store(output, out, op, self.size()), (pieces, out)

    # -- collectives

    def allreduce(self, tensors: list[Tensor], opts: Any) -> MPIWork:
        steps = [self._allreduce_step(tensor, opts.reduceOp) for tensor in tensors]
        return self._work("all_reduce", _bytes(tensors), steps, tensors, opts)

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: list[Tensor], opts: Any) -> MPIWork:
        (tensor,) = tensors
        flat = flatten(tensor)
        ticket = self._host.broadcast(flat, opts.rootRank) if self._host else None
        request = ticket or self._comm.Ibcast(as_bytes(flat), opts.rootRank)
        return self._work("broadcast", flat.nbytes, [(request, lambda: store(tensor, flat), flat)], tensors, opts)

    def reduce(self, tensors: list[Tensor], opts: Any) -> MPIWork:
        (tensor,) = tensors
        must_reduce(tensor, opts.reduceOp)
        flat, mpi_op = for_reduction(tensor, opts.reduceOp)
        if self.rank() != opts.rootRank:
            request = self._comm.Ireduce(flat.numpy(), None, mpi_op, opts.rootRank)
            return self._work("reduce", flat.nbytes, [(request, None, flat)], [], opts)
        request = self._comm.Ireduce(MPI.IN_PLACE, flat.numpy(), mpi_op, opts.rootRank)
        finish = partial(store, tensor, flat, opts.reduceOp, self.size())
        return self._work("reduce", flat.nbytes, [(request, finish, flat)], tensors, opts)

    def _allgather_base(self, output: Tensor, source: Tensor, opts: Any = None) -> MPIWork:
        return self._work("all_gather", source.nbytes, [self._allgather_step(output, source)], [output], opts)

    def allgather_into_tensor_coalesced(
        self, outputs: list[Tensor], sources: list[Tensor], opts: Any = None
    ) -> MPIWork:
        steps = [self._allgather_step(output, source) for output, source in zip(outputs, sources, strict=True)]
        return self._work("all_gather", _bytes(sources), steps, outputs, opts)

    def allgather(self, outputs: list[list[Tensor]], sources: list[Tensor], opts: Any = None) -> MPIWork:
        (pieces,), (source,) = outputs, sources
        recv, unpack = receive_into(pieces)
        flat = flatten(source)
        request = self._comm.Iallgatherv(as_bytes(flat), recv)
        return self._work("all_gather_list", flat.nbytes, [(request, unpack, (flat, recv))], pieces, opts)

    def _reduce_scatter_base(self, output: Tensor, source: Tensor, opts: Any) -> MPIWork:
        step = self._reduce_scatter_step(output, source, opts.reduceOp)
        return self._work("reduce_scatter", source.nbytes, [step], [output], opts)

    def reduce_scatter_tensor_coalesced(
        self, outputs: list[Tensor], sources: list[Tensor], opts: Any
    ) -> MPIWork:
        pairs = zip(outputs, sources, strict=True)
        steps = [self._reduce_scatter_step(output, source, opts.reduceOp) for output, source in pairs]
        return self._work("reduce_scatter", _bytes(sources), steps, outputs, opts)

    def reduce_scatter(self, outputs: list[Tensor], sources: list[list[Tensor]], opts: Any) -> MPIWork:
        (output,), (pieces,), op = outputs, sources, opts.reduceOp
        must_reduce(output, op)
        flat, mpi_op = for_reduction(torch.cat([piece.detach().reshape(-1) for piece in pieces]), op)
        out = torch.empty(output.numel(), dtype=flat.dtype)
        request = self._comm.Ireduce_scatter(flat.numpy(), out.numpy(), [piece.numel() for piece in pieces], mpi_op)
        finish = partial(store, output, out, op, self.size())
        return self._work("reduce_scatter_list", flat.nbytes, [(request, finish, (flat, out))], outputs, opts)

    def gather(self, outputs: list[list[Tensor]], sources: list[Tensor], opts: Any) -> MPIWork:
        (source,) = sources
        at_root = self.rank() == opts.rootRank
        recv, unpack = receive_into(outputs[0]) if at_root else (None, None)
        flat = flatten(source)
        request = self._comm.Igatherv(as_bytes(flat), recv, opts.rootRank)
        return self._work("gather", flat.nbytes, [(request, unpack, (flat, recv))], outputs[0] if at_root else [], opts)

    def scatter(self, outputs: list[Tensor], sources: list[list[Tensor]], opts: Any) -> MPIWork:
        (output,) = outputs
        send = send_from(sources[0]) if self.rank() == opts.rootRank else None
        out = torch.empty(output.numel(), dtype=output.dtype)
        request = self._comm.Iscatterv(send, as_bytes(out), opts.rootRank)
        return self._work("scatter", out.nbytes, [(request, lambda: store(output, out), (send, out))], outputs, opts)

    def alltoall(self, outputs: list[Tensor], sources: list[Tensor], opts: Any = None) -> MPIWork:
        recv, unpack = receive_into(outputs)
        send = send_from(sources)
        request = self._comm.Ialltoallv(send, recv)
        return self._work("all_to_all", _bytes(sources), [(request, unpack, (send, recv))], outputs, opts)

    def alltoall_base(
        self, output: Tensor, source: Tensor, output_splits: list[int], source_splits: list[int], opts: Any = None
    ) -> MPIWork:
        out, flat = flatten(output), flatten(source)
        if overlap(out, flat):
            flat = flat.clone()
        send = cut(flat, parts(source, source_splits, self.size()))
        recv = cut(out, parts(output, output_splits, self.size()))
        request = self._comm.Ialltoallv(send, recv)
        finish = partial(store, output, out)
        return self._work("all_to_all", source.nbytes, [(request, finish, (send, recv))], [output], opts)

    def barrier(self, opts: Any = None) -> MPIWork:
        ticket = self._host.barrier() if self._host else None
        return self._work("barrier", 0, [(ticket or self._comm.Ibarrier(), None, None)], [], opts)

    # -- between two ranks

    def send(self, tensors: list[Tensor], dst_rank: int, tag: int) -> MPIWork:
        (tensor,) = tensors
        flat, peer, mail = flatten(tensor), self._ranks[dst_rank], self._home.mail
        if mail and peer in mail.files:
            step: Step = mail.send(self._comm, flat, dst_rank, tag), None, None
        else:
            step = self._comm.Isend(as_bytes(flat), dst_rank, tag), None, flat
        self._home.ring_rank(peer)
        work = self._work("send", flat.nbytes, [step], [], peer=dst_rank)
        if mail and not work.test():  # MPI has no room for it now, and nobody rings when it has
            self._home.unrung.add(work)
        return work

    def recv(self, tensors: list[Tensor], src_rank: int, tag: int) -> MPIWork:
        (tensor,) = tensors
        flat, mail = flatten(tensor), self._home.mail
        if mail and (src_rank < 0 or self._ranks[src_rank] in mail.files):
            request: Any = mail.receive(self._comm, self._ranks, flat, src_rank, tag)
        else:
            request = self._comm.Irecv(as_bytes(flat), src_rank, tag)
            self._home.ring_rank(self._global(src_rank))  # where its message was here, its send may be over
        return self._work("recv", flat.nbytes, [(request, lambda: store(tensor, flat), flat)], tensors, peer=src_rank)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> MPIWork:
        return self.recv(tensors, MPI.ANY_SOURCE, tag)

    # -- life and memory

    def shutdown(self) -> None:
        """Wait for what is in flight and free the communicator; all members call it. A second call does nothing."""
        failures = []
        for work in list(self._in_flight):
            try:
                work.wait()
            except ValueError as error:  # of a message that is too long, and that nobody has waited for
                failures.append(error)
        if self._host is not None:
            self._host.close()
        if self._comm != MPI.COMM_NULL:
            self._comm.Free()
        if failures:
            raise failures[0]

    def shared(self, numel: int, dtype: torch.dtype, common: bool = False) -> Tensor | None:
        """Return a zeroed tensor [numel] that lies in memory of the whole group, or None where there is none for all.

        Reductions of it read every rank's elements where they are. `common`: all ranks get the same elements; an
        all-gather of each rank's own part then only waits until all are there, and the callers see to it that nobody
        writes what another still reads. All ranks must call. The memory lives as long as a tensor in it.
        """
        found = None if self._host is None else self._host.allocate(numel * dtype.itemsize, common)
        return None if found is None else found.view(dtype)

    def lend(self, numel: int, dtype: torch.dtype, common: bool = False) -> Tensor | None:
        """Return what `shared` does, with whatever lies there, lent until no tensor lies in it on any rank.

        After a reduce-scatter of it, it is not written again: others may still read it. All ranks must call, in the
        same order as their collectives.
        """
        if self._host is None:
            return None
        for work in [work for work in self._in_flight if work.is_collective]:
            work.wait()  # ranks choose alike when all know of the same turns
        found = self._host.lend(numel * dtype.itemsize, common)
        return None if found is None else found.view(dtype)

    # torch 2.13 calls these by new names.
    all_gather_single = _allgather_base
    reduce_scatter_single = _reduce_scatter_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced
    all_to_all_single = alltoall_base
