"""Collectives of tensor parallelism with their autograd pairs.

    forward          backward         where
    copy_to          identity         all-reduce       enter a column-parallel part (no sequence parallelism)
    reduce_from      all-reduce       identity         leave a row-parallel part
    gather_sequence  all-gather       reduce-scatter   enter, with sequence parallelism
    scatter_sequence reduce-scatter   all-gather       leave, with sequence parallelism

Source: Shoeybi et al. 2019, arXiv 1909.08053 (f and g); Korthikanti et al. 2022, arXiv 2205.05198 (g-bar).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from hpcpar.comm.groups import Group

# torch 2.13 renamed both and warns at every call of the old name; torch 2.11 has only the old
_NEWEST_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_NEWEST_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_flat(out: Tensor, part: Tensor, group: Group, async_op: bool = False) -> dist.Work | None:
    """All-gather equal parts into `out`, in group order. `part` may be the rank's own piece of `out`."""
    work: dist.Work | None = _NEWEST_GATHER(out, part, group=group, async_op=async_op)
    return work


def reduce_scatter_flat(out: Tensor, whole: Tensor, group: Group, async_op: bool = False) -> dist.Work | None:
    """Sum `whole` over the group and keep this rank's part; `out` may be that part of `whole`."""
    work: dist.Work | None = _NEWEST_REDUCE_SCATTER(out, whole, group=group, async_op=async_op)
    return work


def wait(work: dist.Work | None) -> None:
    """Wait for what was started; nothing was where a group has one rank."""
    if work is not None:
        work.wait()


def shared_zeros(group: Group | None, numel: int, dtype: torch.dtype, device: torch.device,
                 common: bool = False) -> Tensor | None:
    """Return zeros [numel] in memory that the group shares, or None where its backend has none.

    `common`: all ranks get the same memory, so that gathering each one's part moves nothing; it must not be
    written while another rank may read it. All ranks of the group must call.
    """
    shared = getattr(group, "shared", None)
    found: Tensor | None = shared(numel, dtype, common) if shared is not None and device.type == "cpu" else None
    return found


def zeros_of(group: Group | None, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros [numel], in memory that the group shares where its backend has such: reductions then copy nothing.

    All ranks of the group must call.
    """
    found = shared_zeros(group, numel, dtype, device)
    return torch.zeros(numel, dtype=dtype, device=device) if found is None else found


def lent(shape: Sequence[int], like: Tensor, group: Group, common: bool = False) -> Tensor | None:
    """Return memory that the group shares, with whatever lies there, or None where its backend lends none.

    A reduce-scatter reads it where it is, and it must not be written after that; with `common`, an all-gather of each
    one's part moves nothing. It goes back by itself. All ranks must call, in the same order as their collectives.
    """
    lend = getattr(group, "lend", None)
    found: Tensor | None = lend(math.prod(shape), like.dtype, common) if lend and like.device.type == "cpu" else None
    return None if found is None else found.view(*shape)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Return the sum of x over the group, in a new tensor. Cost: 2 (n-1)/n of its bytes a rank."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_gather_sequence(x: Tensor, group: Group) -> Tensor:
    """[batch, seq/n, hidden] on each of n ranks -> [n batch, seq/n, hidden], rank by rank: no element is moved twice.

    Cost: (n-1)/n of the result's bytes.
    """
    batch = x.shape[0]
    shape = (group.size() * batch, *x.shape[1:])
    gathered = lent(shape, x, group, common=True)
    if gathered is None:
        gathered, own = x.new_empty(shape), x.contiguous()
    else:
        own = gathered[group.rank() * batch:][:batch].copy_(x)
    gather_flat(gathered, own, group)
    return gathered


def reduce_scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """[n batch, seq/n, hidden] partial sums -> [batch, seq/n, hidden], each rank its tokens. Cost as all-gather."""
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    reduce_scatter_flat(out, x.contiguous(), group)
    return out


class _CopyTo(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.group), None


class _ReduceFrom(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _GatherSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_sequence(grads[0], ctx.group), None


class _ScatterSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return reduce_scatter_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather_sequence(grads[0], ctx.group), None


def copy_to(x: Tensor, group: Group) -> Tensor:
    """Pass x on; its gradient is summed over the group."""
    out: Tensor = _CopyTo.apply(x, group)
    return out


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """Sum x over the group; its gradient passes unchanged."""
    out: Tensor = _ReduceFrom.apply(x, group)
    return out


def gather_sequence(x: Tensor, group: Group) -> Tensor:
    """All-gather the ranks' tokens, as all_gather_sequence; the gradient is reduce-scattered."""
    out: Tensor = _GatherSequence.apply(x, group)
    return out


def scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """Sum and keep the rank's tokens, as reduce_scatter_sequence; the gradient is all-gathered."""
    out: Tensor = _ScatterSequence.apply(x, group)
    return out
