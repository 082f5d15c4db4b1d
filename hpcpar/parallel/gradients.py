"""Gradients of matrices are computed straight into their flat bucket.

    autograd   dW = grad^T x, a new tensor; .grad += dW; next step .grad = 0: six passes over a weight's memory
    here       bucket (+)= grad^T x, one matrix product: one pass, for the first microbatch overwrites; then two

A product still runs in backward, after the gradient of its input; or, where a schedule splits backwards into I and W,
it is put off: backward (I) leaves it in a list, and W works the list off. What is not a matrix product (norms, biases,
rows of the embedding) stays with I: it is small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from hpcpar.nn.linear import Linear

Room = Callable[[Sequence[int], Tensor], Tensor | None]  # (shape, like): memory for a result, None: any will do
PutOff = list[Callable[[], None]]  # matrix products still to be done


class Sink:
    """Where one parameter's gradient goes: `place()` is its view of the bucket at the moment, in the main dtype.

    `done` is called after every contribution: a microbatch brings one for every use of the parameter. With `put_off`
    backward does not do the products but adds them to that list.
    """

    def __init__(self, place: Callable[[], Tensor], done: Callable[[], None], put_off: PutOff | None = None):
        self.place, self.done, self.put_off = place, done, put_off
        self.empty = True  # what lies there is of another step
        self.output_room: Room | None = None  # where the matrix's output belongs, if tp sums it
        self.input_room: Room | None = None  # where its input's gradient belongs (of the first matrix: for all)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Take the place of F.linear: x [..., in], weight [out, in] -> [..., out]."""
        out: Tensor = _Products.apply(x, [self], weight, bias)[0]
        return out

    def rows(self, numbers: Tensor, weight: Tensor) -> Tensor:
        """Take the place of F.embedding: numbers [...], weight [rows, width] -> [..., width]."""
        out: Tensor = _Rows.apply(numbers, weight, self)
        return out

    def add(self, grad: Tensor) -> None:
        """Add a whole contribution of the parameter's shape."""
        main = self.place()
        main.copy_(grad) if self.empty else main.add_(grad)
        self.empty = False
        self.done()

    def add_product(self, grad: Tensor, x: Tensor) -> None:
        """Add grad^T x, a whole contribution, or put it off: grad [tokens, out], x [tokens, in]."""
        def add() -> None:
            self.accumulate(grad, x)
            self.done()

        add() if self.put_off is None else self.put_off.append(add)

    def accumulate(self, grad: Tensor, x: Tensor) -> None:
        """Add grad^T x, a part of a contribution; `grad` may leave out the last rows of a padded vocabulary."""
        whole = self.place()
        main, padding = whole[:grad.shape[1]], whole[grad.shape[1]:]
        if self.empty:
            padding.zero_()
        if grad.dtype != main.dtype and grad.is_cuda:
            if self.empty:
                torch.mm(grad.t(), x, out_dtype=main.dtype, out=main)
            else:
                torch.addmm(main, grad.t(), x, out_dtype=main.dtype, out=main)
        elif grad.dtype != main.dtype:  # on CPU no product of 16-bit factors gives a 32-bit sum
            main.copy_(grad.t() @ x) if self.empty else main.add_(grad.t() @ x)
        elif self.empty:
            torch.mm(grad.t(), x, out=main)
        else:
            torch.addmm(main, grad.t(), x, out=main)
        self.empty = False

    def add_rows(self, numbers: Tensor, grad: Tensor) -> None:
        """Add grad [tokens, width] to the rows numbers [tokens], in a fixed order."""
        main = self.place()
        if self.empty:
            main.zero_()
        main.index_put_((numbers,), grad.to(main.dtype), accumulate=True)
        self.empty = False
        self.done()


def project(x: Tensor, *matrices: Linear) -> tuple[Tensor, ...]:
    """Take the place of nn.linear.project: one input's gradient is added up where it lies, matrix by matrix."""
    sinks = [matrix.product for matrix in matrices]
    outs: tuple[Tensor, ...] = _Products.apply(x, sinks, *(each for m in matrices for each in (m.weight, m.bias)))
    return outs


class _Products(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sinks: Sequence[Sink], *parameters: Tensor) -> tuple[Tensor, ...]:
        weights, biases = parameters[::2], parameters[1::2]
        ctx.save_for_backward(x, *weights)
        ctx.sinks = sinks
        return tuple(_multiply(x, *each) for each in zip(weights, biases, sinks, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        flats = [grad.flatten(0, -2) for grad in grads]
        dx = input_gradient(x, flats, weights, ctx.sinks[0].input_room) if ctx.needs_input_grad[0] else None
        return dx, None, *parameter_gradients(x, flats, ctx.sinks, ctx.needs_input_grad[2:])


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, sink: Sink) -> Tensor:
    out = sink.output_room((*x.shape[:-1], len(weight)), x) if sink.output_room and bias is None else None
    if out is None:
        return F.linear(x, weight, bias)
    torch.mm(x.flatten(0, -2), weight.t(), out=out.flatten(0, -2))
    return out


def input_gradient(x: Tensor, grads: Sequence[Tensor], weights: Sequence[Tensor], room: Room | None = None) -> Tensor:
    """Return the gradient of x [..., in] from each product's gradient [tokens, out] and weight [out, in]."""
    dx = room(x.shape, x) if room else None
    if dx is None:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    flat, ((first, weight), *rest) = dx.flatten(0, -2), list(zip(grads, weights, strict=True))[::-1]  # as autograd does
    torch.mm(first, weight, out=flat)
    for grad, weight in rest:
        torch.addmm(flat, grad, weight, out=flat)  # torch's counter of FLOPs does not see addmm_
    return dx


def parameter_gradients(x: Tensor, grads: Sequence[Tensor], sinks: Sequence[Sink],
                        needed: Sequence[bool]) -> list[Tensor | None]:
    """Add each weight's gradient to its sink, last first, as buckets are packed; return what autograd wants of weights
    and biases in turn: nothing, and the bias' gradient where it is `needed`.
    """
    for grad, sink in zip(grads[::-1], sinks[::-1], strict=True):
        sink.add_product(grad, x.flatten(0, -2))
    return [each for grad, wanted in zip(grads, needed[1::2], strict=True)
            for each in (None, grad.sum(0) if wanted else None)]


class _Rows(Function):
    @staticmethod
    def forward(ctx: Any, numbers: Tensor, weight: Tensor, sink: Sink) -> Tensor:
        ctx.save_for_backward(numbers)
        ctx.sink = sink
        return F.embedding(numbers, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        (numbers,) = ctx.saved_tensors
        ctx.sink.add_rows(numbers.flatten(), grads[0].flatten(0, -2))
        return None, None, None
