"""Collectives of tensor parallelism with their autograd pairs.

    forward          backward         where
    copy_to          identity         all-reduce       enter a column-parallel part (no sequence parallelism)
    reduce_from      all-reduce       identity         leave a row-parallel part
    gather_sequence  all-gather       reduce-scatter   enter, with sequence parallelism
    scatter_sequence reduce-scatter   all-gather       leave, with sequence parallelism

Source: Shoeybi et al. 2019, arXiv 1909.08053 (f and g); Korthikanti et al. 2022, arXiv 2205.05198 (g-bar).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from hpcpar.comm.groups import Group


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Return the sum of x over the group, in a new tensor. Cost: 2 (n-1)/n of its bytes a rank."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_gather_sequence(x: Tensor, group: Group) -> Tensor:
    """[batch, seq/n, hidden] on each of n ranks -> [batch, seq, hidden]. Cost: (n-1)/n of the result's bytes."""
    size = dist.get_world_size(group)
    batch, part, hidden = x.shape
    gathered = x.new_empty(size * batch, part, hidden)
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    # with one sequence the parts already lie in order
    return gathered.view(size, batch, part, hidden).transpose(0, 1).reshape(batch, size * part, hidden)


def reduce_scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """[batch, seq, hidden] partial sums -> [batch, seq/n, hidden], each rank its tokens. Cost as all-gather."""
    size = dist.get_world_size(group)
    batch, seq, hidden = x.shape
    parts = x.view(batch, size, seq // size, hidden).transpose(0, 1).contiguous()
    out = x.new_empty(batch, seq // size, hidden)
    dist.reduce_scatter_tensor(out, parts, group=group)
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
        return reduce_scatter_sequence(grads[0].contiguous(), ctx.group), None


class _ScatterSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return reduce_scatter_sequence(x.contiguous(), group)

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
    """All-gather x over the sequence dim; its gradient is reduce-scattered."""
    out: Tensor = _GatherSequence.apply(x, group)
    return out


def scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """Reduce-scatter x over the sequence dim; its gradient is all-gathered."""
    out: Tensor = _ScatterSequence.apply(x, group)
    return out
