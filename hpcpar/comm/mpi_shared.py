"""Collectives of a group whose ranks are all on one host, as turns in shared memory: part of `mpi_backend`.

What is longer than a slot takes several turns. What lies in memory that the group shares (`OneHost.allocate`) is not
even put into a slot: the others read it where it is.
"""

# mypy: disable-error-code="attr-defined"
# torch's stubs know fewer operations than there are.
from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from .mpi_blocks import Blocks
from .mpi_lanes import Lanes, Ring, Ticket, Turn, open_lanes
from .mpi_memory import map_together

SMALL_BYTES = 1 << 14  # up to here every rank sums all of an all-reduce: one turn, not two
_LARGE_BYTES, _LARGEST_BYTES = 1 << 26, 1 << 23  # of all ranks' lanes for longer messages, and of one rank's
_BLOCK = 1 << 16  # elements that are summed at a time: they stay in the core's cache
_Op = dist.ReduceOp.RedOpType
_COMBINE: dict[Any, Callable[..., Tensor]] = {
    _Op.SUM: torch.add, _Op.AVG: torch.add, _Op.PRODUCT: torch.mul, _Op.MIN: torch.minimum, _Op.MAX: torch.maximum,
    _Op.BAND: torch.bitwise_and, _Op.BOR: torch.bitwise_or, _Op.BXOR: torch.bitwise_xor,
}  # fmt: skip


@dataclass(frozen=True)
class Region:
    """Memory that the whole group has mapped: where it begins here, and every rank's bytes by rank."""

    start: int
    ranks: list[Tensor]
    common: bool  # there is one memory for all, not one for each
    lent: bool  # nobody writes it again after a sum of it
    number: int  # the same on all ranks

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a contiguous tensor lies in this rank's part."""
        end = self.start + self.ranks[0].numel()
        return self.start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= end

    def views(self, tensor: Tensor) -> list[Tensor]:
        """Return what every rank has where `tensor` lies here, flat."""
        low = tensor.data_ptr() - self.start
        return [part[low:low + tensor.nbytes].view(tensor.dtype) for part in self.ranks]


class OneHost:
    """A group's collectives on flat tensors. A method returns None, on all ranks alike, where there is no memory left.

    Lanes are made by the first collective that needs them, in which all ranks then wait for one another: one pair for
    small messages and for what lies in regions, one for long messages.
    """

    def __init__(self, comm: MPI.Intracomm, all_lanes: list[Lanes], ring: Ring):
        self._comm, self._rank, self._size, self._all_lanes = comm, comm.rank, comm.size, all_lanes
        self._ring = ring
        self._lanes: dict[bool, Lanes | None] = {}
        self._regions: dict[int, Region] = {}  # by where they begin
        self._blocks: Blocks | None = None

    def _for(self, num_bytes: int) -> Lanes | None:
        """Return the lanes for messages of this many bytes a rank."""
        is_long = num_bytes > SMALL_BYTES
        if is_long not in self._lanes:
            slot = min(_LARGEST_BYTES, _LARGE_BYTES // self._size) // 2 if is_long else SMALL_BYTES
            lanes = open_lanes(self._comm, max(slot // 4096 * 4096, SMALL_BYTES), self._ring)
            self._lanes[is_long] = lanes
            if lanes is not None:
                self._all_lanes.append(lanes)
        return self._lanes[is_long]

    def close(self) -> None:
        """Let go of the memory; tensors in it stay valid."""
        for lanes in self._lanes.values():
            if lanes is not None:
                self._all_lanes.remove(lanes)
        self._lanes.clear()
        self._regions.clear()
        self._blocks = None

    def barrier(self) -> Ticket | None:
        """Let nobody go on before all have come."""
        lanes = self._for(0)
        return None if lanes is None else lanes.begin("barrier", [Turn(None, _nothing)])

    def broadcast(self, flat: Tensor, root: int) -> Ticket | None:
        """Copy the root's elements to all."""
        lanes = self._for(flat.nbytes)
        if lanes is None:
            return None
        meaning, pieces = f"broadcast {root} {flat.nbytes}", _pieces(flat, lanes.slot_bytes)
        if self._rank == root:
            return lanes.begin(meaning, [Turn(partial(_put, piece), _nothing) for piece in pieces])

        def take(slots: list[Tensor], piece: Tensor) -> None:
            _get(slots[root], piece)

        return lanes.begin(meaning, [Turn(None, partial(take, piece=piece)) for piece in pieces])

    def all_gather(self, out: Tensor, piece: Tensor) -> Ticket | None:
        """Copy every rank's `piece` [n] into `out` [size n]."""
        rows = out.view(self._size, -1)
        in_place = rows[self._rank].data_ptr() == piece.data_ptr()
        region = self._region(out)
        there = region if region is not None and region.common and in_place else None
        lanes = self._for(0 if there else piece.nbytes)
        if lanes is None:
            return None
        if there:  # what each wrote is there for all
            return lanes.begin(f"all_gather {piece.nbytes} in {there.number}", [Turn(None, _nothing)])

        def take(slots: list[Tensor], low: int, high: int) -> None:
            for rank, slot in enumerate(slots):
                if rank != self._rank or not in_place:
                    _get(slot, rows[rank, low:high])

        step = lanes.slot_bytes // piece.element_size()
        return lanes.begin(f"all_gather {piece.nbytes}", [
            Turn(partial(_put, piece[low:low + step]), partial(take, low=low, high=low + step))
            for low in range(0, piece.numel(), step)])

    def reduce_scatter(self, out: Tensor, whole: Tensor, op: dist.ReduceOp) -> Ticket | None:
        """Reduce `whole` [size n] over the ranks; each keeps its own part, `out` [n]."""
        region, num = self._region(whole), out.numel()
        lanes = self._for(0 if region else whole.nbytes)
        if lanes is None:
            return None
        meaning = f"reduce_scatter {op.op} {whole.nbytes}"
        if region is not None:
            own = [each[self._rank * num:(self._rank + 1) * num] for each in region.views(whole)]
            turn = Turn(None, lambda slots: _reduce(out, own, op), held=not region.lent)
            return lanes.begin(f"{meaning} in {region.number}", [turn])
        rows = whole.view(self._size, num)

        def put(slot: Tensor, low: int, high: int) -> None:
            _put(rows[:, low:high], slot)

        def take(slots: list[Tensor], low: int, high: int) -> None:
            _reduce(out[low:high], [each[self._rank] for each in _as(slots, rows[:, low:high])], op)

        step = lanes.slot_bytes // (self._size * whole.element_size())
        return lanes.begin(meaning, [
            Turn(partial(put, low=low, high=low + step), partial(take, low=low, high=low + step))
            for low in range(0, num, step)])

    def all_reduce(self, flat: Tensor, op: dist.ReduceOp) -> Ticket | None:
        """Reduce `flat` [n] in place: small ones all by everyone, others a part by each, who then shows it to all."""
        lanes = self._for(flat.nbytes)
        if lanes is None:
            return None
        meaning = f"all_reduce {op.op} {flat.nbytes}"
        if flat.nbytes <= SMALL_BYTES:
            return lanes.begin(meaning, [Turn(partial(_put, flat), lambda slots: _reduce(flat, _as(slots, flat), op))])
        return lanes.begin(meaning, [turn for piece in _pieces(flat, lanes.slot_bytes)
                                     for turn in self._reduce_and_show(piece, op)])

    def _reduce_and_show(self, piece: Tensor, op: dist.ReduceOp) -> list[Turn]:
        share = math.ceil(piece.numel() / self._size)
        parts = [piece[rank * share:(rank + 1) * share] for rank in range(self._size)]
        own = slice(self._rank * share, (self._rank + 1) * share)

        def reduce(slots: list[Tensor]) -> None:
            _reduce(parts[self._rank], [each[own] for each in _as(slots, piece)], op)

        def gather(slots: list[Tensor]) -> None:
            for rank, part in enumerate(parts):
                if rank != self._rank:
                    _get(slots[rank], part)

        return [Turn(partial(_put, piece), reduce), Turn(partial(_put, parts[self._rank]), gather, chained=True)]

    def allocate(self, num_bytes: int, common: bool, lent: bool = False) -> Tensor | None:
        """Return zeroed bytes that reductions and gathers work on in place; all ranks call.

        `common`: all ranks get the same memory, and keep apart by collectives who writes where and when. `lent`: the
        caller writes what it has summed no more, and leaves half of the host's shared memory to others.
        """
        lane = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        together = lane * (1 if common else self._size)
        memory = map_together(self._comm, together, spare=0.5 if lent else 0) if num_bytes else None
        if memory is None:
            return None
        whole = torch.frombuffer(memory, dtype=torch.uint8).numpy()
        ranks = [torch.from_numpy(whole[(0 if common else rank) * lane:][:num_bytes]) for rank in range(self._size)]
        own = ranks[self._rank]
        self._regions[own.data_ptr()] = Region(own.data_ptr(), ranks, common, lent, len(self._regions))
        return own

    def lend(self, num_bytes: int, common: bool) -> Tensor | None:
        """Return bytes as `allocate` does, but with whatever lies there, for as long as a tensor lies in them.

        After a reduction of them they are not written again: others may still read them. All ranks call in one order,
        with no collective under way.
        """
        lanes = self._for(0)
        if lanes is None or not num_bytes:
            return None
        if self._blocks is None:
            self._blocks = Blocks(partial(self.allocate, lent=True))
            lanes.word = self._blocks.free
        return self._blocks.lend(num_bytes, common, lanes)

    def _region(self, tensor: Tensor) -> Region | None:
        region = self._regions.get(tensor.untyped_storage().data_ptr())
        return region if region is not None and region.holds(tensor) else None


def _nothing(slots: list[Tensor]) -> None:
    """Take nothing."""


def _put(piece: Tensor, slot: Tensor) -> None:
    slot[:piece.nbytes].view(piece.dtype).view(piece.shape).copy_(piece)


def _get(slot: Tensor, piece: Tensor) -> None:
    piece.copy_(slot[:piece.nbytes].view(piece.dtype))


def _as(slots: list[Tensor], piece: Tensor) -> list[Tensor]:
    """Return the tensor like `piece` that each slot holds."""
    return [slot[:piece.nbytes].view(piece.dtype).view(piece.shape) for slot in slots]


def _pieces(flat: Tensor, num_bytes: int) -> tuple[Tensor, ...]:
    return flat.split(num_bytes // flat.element_size()) if flat.numel() else ()


def _reduce(out: Tensor, parts: list[Tensor], op: dist.ReduceOp) -> None:
    """Combine equal tensors in rank order, 16-bit floats in fp32; `out` may be one of them."""
    combine = _COMBINE[op.op]
    wide = torch.float32 if out.dtype in (torch.bfloat16, torch.float16) else out.dtype
    for low in range(0, out.numel(), _BLOCK):
        first, *blocks, last = [part[low:low + _BLOCK].to(wide) for part in parts]
        total, target = first, out[low:low + _BLOCK]
        for block in blocks:
            total = combine(total, block, out=None if total is first else total)
        total = combine(total, last, out=target if out.dtype == wide else None)  # only now: `target` may be a block
        if op.op == _Op.AVG:
            total /= len(parts)
        if total is not target:
            target.copy_(total)
