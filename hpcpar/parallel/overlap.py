"""Exchanges of tensor parallelism in pieces, each under way while the products of other pieces are computed.

    enter a layer's part    gather 0  | gather 1   | gather 2   |
                                      | products 0 | products 1 | products 2
    leave it                product 0 | product 1  | product 2  |
                                      | sum 0      | sum 1      | sum 2

Backward has the same two, leaving first, each followed by the products for the weights' gradients, which the last
sums are under way beside (unless the schedule puts them off). A piece is a part of every rank's tokens; calls come in
the order of comm/collectives, and carry the same bytes in all. Source: Wang et al. 2023, Overlap Communication with
Dependent Computation via Decomposition in Large Deep Learning Models, ASPLOS, doi 10.1145/3567955.3567959.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from hpcpar.comm.collectives import gather_flat, reduce_scatter_flat, wait
from hpcpar.comm.groups import Group
from hpcpar.nn.linear import Linear
from hpcpar.nn.transformer import Block
from hpcpar.parallel.gradients import Sink, input_gradient, parameter_gradients


class Overlap(NamedTuple):
    """Exchanges of [batch, seq/tp, width] in pieces: gathered, [pieces, tp x batch, seq/tp/pieces, width]."""

    group: Group
    pieces: int


def overlap_exchanges(block: Block, overlap: Overlap) -> None:
    """Let a layer's products gather what they read and sum what they write, in place; its sinks must be set."""
    for part, last in ((block.attention, block.attention.out), (block.mlp, block.mlp.down)):
        part.project = partial(gathered_products, overlap)
        last.product = partial(scattered_product, overlap, cast(Sink, last.product))


def gathered_products(overlap: Overlap, x: Tensor, *matrices: Linear) -> tuple[Tensor, ...]:
    """Multiply x [batch, seq/tp, in], gathered over tp, by each matrix: [pieces x tp x batch, seq/tp/pieces, out]."""
    sinks = [matrix.product for matrix in matrices]
    parameters = [each for matrix in matrices for each in (matrix.weight, matrix.bias)]
    outs: tuple[Tensor, ...] = _GatheredProducts.apply(x, overlap, sinks, *parameters)
    return outs


def scattered_product(overlap: Overlap, sink: Sink, x: Tensor, weight: Tensor, bias: None) -> Tensor:
    """Multiply x [pieces x tp x batch, seq/tp/pieces, in], and sum over tp: [batch, seq/tp, out]."""
    assert bias is None, "every tp rank would add it"
    out: Tensor = _ScatteredProduct.apply(x, overlap, sink, weight)
    return out


class _GatheredProducts(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, overlap: Overlap, sinks: Sequence[Sink],
                *parameters: Tensor) -> tuple[Tensor, ...]:
        weights, biases = parameters[::2], parameters[1::2]
        gathered, arrivals = _gather(x, overlap)
        outs = [gathered.new_empty(*gathered.shape[:-1], len(weight)) for weight in weights]
        for index in arrivals:
            for out, weight, bias in zip(outs, weights, biases, strict=True):
                rows, into = gathered[index].flatten(0, -2), out[index].flatten(0, -2)
                if bias is None:
                    torch.mm(rows, weight.t(), out=into)
                else:
                    torch.addmm(bias, rows, weight.t(), out=into)
        ctx.save_for_backward(gathered, *weights)
        ctx.overlap, ctx.sinks = overlap, sinks
        return tuple(out.flatten(0, 1) for out in outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gathered, *weights = ctx.saved_tensors
        flats = [grad.flatten(0, -2) for grad in grads]
        sums = _Sums(ctx.overlap.group)
        for x, *parts in zip(gathered, *(flat.chunk(len(gathered)) for flat in flats), strict=True):
            sums.start(input_gradient(x, parts, weights))
        of_parameters = parameter_gradients(gathered, flats, ctx.sinks, ctx.needs_input_grad[3:])
        return sums.joined(), None, None, *of_parameters


class _ScatteredProduct(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, overlap: Overlap, sink: Sink, weight: Tensor) -> Tensor:
        sums = _Sums(overlap.group)
        for part in x.chunk(overlap.pieces):
            sums.start(F.linear(part, weight))
        ctx.save_for_backward(x, weight)
        ctx.overlap, ctx.sink = overlap, sink
        return sums.joined()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        gathered, arrivals = _gather(grads[0], ctx.overlap)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        parts = dx.chunk(ctx.overlap.pieces)
        for index in arrivals:
            torch.mm(gathered[index].flatten(0, -2), weight, out=parts[index].flatten(0, -2))
        ctx.sink.add_product(gathered.flatten(0, -2), x.flatten(0, -2))
        return dx, None, None, None


def _gather(x: Tensor, overlap: Overlap) -> tuple[Tensor, Iterator[int]]:
    """Start to gather x; return where it will lie, and the pieces' numbers as they arrive."""
    own = x.unflatten(1, (overlap.pieces, -1)).transpose(0, 1).contiguous()
    num, batch, *rest = own.shape
    gathered = own.new_empty(num, overlap.group.size() * batch, *rest)
    works = [gather_flat(gathered[index], own[index], overlap.group, async_op=True) for index in range(num)]

    def arrivals() -> Iterator[int]:
        for index, work in enumerate(works):
            wait(work)
            yield index

    return gathered, arrivals()


class _Sums:
    """Sums over tp of pieces [tp x batch, seq/tp/pieces, width], under way."""

    def __init__(self, group: Group):
        self._group = group
        self._under_way: list[tuple[dist.Work | None, Tensor]] = []

    def start(self, whole: Tensor) -> None:
        """Start to sum the next piece, and to scatter it over the ranks."""
        out = whole.new_empty(len(whole) // self._group.size(), *whole.shape[1:])
        self._under_way.append((reduce_scatter_flat(out, whole, self._group, async_op=True), out))

    def joined(self) -> Tensor:
        """Wait for all and return this rank's tokens: [batch, seq/tp, width]."""
        for work, _ in self._under_way:
            wait(work)
        return torch.cat([out for _, out in self._under_way], dim=1)
