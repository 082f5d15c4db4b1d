"""How the memory of torch tensors is shown to MPI: flat, without a copy where it is contiguous."""

# mypy: disable-error-code="attr-defined"
# torch's stubs leave most of RedOpType out.
from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

_RedOp = dist.ReduceOp.RedOpType
_OPS = {
    _RedOp.SUM: MPI.SUM, _RedOp.AVG: MPI.SUM, _RedOp.PRODUCT: MPI.PROD, _RedOp.MIN: MPI.MIN, _RedOp.MAX: MPI.MAX,
    _RedOp.BAND: MPI.BAND, _RedOp.BOR: MPI.BOR, _RedOp.BXOR: MPI.BXOR,
}  # fmt: skip
# MPI has no arithmetic on 16-bit floats; torch's bool is one byte that holds 0 or 1, and its sum means "any".
_REDUCED_AS = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.bool: torch.uint8}
_BOOL_OPS = {**_OPS, _RedOp.SUM: MPI.MAX, _RedOp.PRODUCT: MPI.MIN}


def flatten(tensor: Tensor) -> Tensor:
    """Return the elements in order as one dim in the host's memory: a view if they lie so there, else a copy."""
    return tensor.detach().contiguous().view(-1).cpu()


def as_bytes(flat: Tensor) -> Any:
    """Return the memory of a flat tensor as bytes, so that any dtype travels (MPI knows no bfloat16)."""
    return flat.view(torch.uint8).numpy()


def overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether two flat tensors share memory."""
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def must_fit(whole: Tensor, piece: Tensor, size: int) -> None:
    """Raise ValueError unless `size` tensors like `piece` make up `whole`: MPI would write past the end."""
    if whole.dtype != piece.dtype or whole.numel() != piece.numel() * size:
        said = [f"{t.dtype} {list(t.shape)}" for t in (piece, whole)]
        raise ValueError(f"{size} pieces of {said[0]} do not make up {said[1]}")


def for_reduction(tensor: Tensor, op: dist.ReduceOp) -> tuple[Tensor, MPI.Op]:
    """Return the elements in a dtype that MPI can reduce (a view where possible) and the MPI operation."""
    ops = _BOOL_OPS if tensor.dtype == torch.bool else _OPS
    return flatten(tensor.detach().to(_REDUCED_AS.get(tensor.dtype, tensor.dtype))), ops[op.op]


def must_reduce(tensor: Tensor, op: dist.ReduceOp) -> None:
    """Raise ValueError unless a tensor of this dtype can be reduced by `op`."""
    if op.op not in _OPS or (op.op == _RedOp.AVG and not tensor.dtype.is_floating_point):
        raise ValueError(f"cannot reduce {tensor.dtype} by {op.op} over MPI")


def store(target: Tensor, flat: Tensor, op: dist.ReduceOp | None = None, size: int = 1) -> None:
    """Finish an average, then copy `flat` to where it belongs unless it lies there already."""
    if op == _RedOp.AVG:
        flat.div_(size)
    if flat.data_ptr() != target.data_ptr() or flat.dtype != target.dtype:
        target.detach().copy_(flat.view(target.shape))


def cut(flat: Tensor, counts: Sequence[int]) -> list[Any]:
    """Describe `flat` to MPI as consecutive pieces of `counts` elements."""
    sizes = [count * flat.element_size() for count in counts]
    return [as_bytes(flat), (sizes, [0, *accumulate(sizes)][:-1]), MPI.BYTE]


def send_from(pieces: Sequence[Tensor]) -> list[Any]:
    """Return all the pieces one after the other in a fresh buffer, described to MPI."""
    return cut(torch.cat([piece.detach().reshape(-1) for piece in pieces]).cpu(), [piece.numel() for piece in pieces])


def receive_into(pieces: Sequence[Tensor]) -> tuple[list[Any], Callable[[], object]]:
    """Return a buffer for all the pieces, and what copies it into them."""
    counts = [piece.numel() for piece in pieces]
    flat = torch.empty(sum(counts), dtype=pieces[0].dtype)

    def unpack() -> None:
        for piece, part in zip(pieces, flat.split(counts), strict=True):
            piece.detach().copy_(part.view(piece.shape))

    return cut(flat, counts), unpack


def parts(tensor: Tensor, splits: Sequence[int], size: int) -> list[int]:
    """Return how many elements go to each rank: rows of dim 0 as in `splits`, or equal parts."""
    if splits:
        row = tensor.numel() // max(tensor.shape[0], 1)
        return [rows * row for rows in splits]
    if tensor.shape[0] % size:
        raise ValueError(f"all-to-all of shape {list(tensor.shape)} without splits does not divide by {size} ranks")
    return [tensor.numel() // size] * size
