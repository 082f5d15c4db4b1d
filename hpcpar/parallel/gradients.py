"""Gradients of matrices are computed straight into their flat bucket.

    autograd   dW = grad^T x, a new tensor; .grad += dW; next step .grad = 0: six passes over a weight's memory
    here       bucket (+)= grad^T x, one matrix product: one pass, for the first microbatch overwrites; then two

A product still runs in backward, after the gradient of its input; or, where a schedule splits backwards into I and W,
it is put off: backward (I) leaves it in a list, and W works the list off. What is not a matrix product (norms, biases,
rows of the embedding) stays with I: it is small.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

PutOff = list[Callable[[], None]]  # matrix products still to be done


class Sink:
    """Where one matrix's gradient goes: `main`, its view of the bucket, in the main dtype.

    `done` is called after every contribution: a microbatch brings one for every use of the matrix. With `put_off`
    backward does not do the products but adds them to that list.
    """

    def __init__(self, main: Tensor, done: Callable[[], None], put_off: PutOff | None = None):
        self.main, self.done, self.put_off = main, done, put_off
        self.empty = True  # what lies in `main` is last step's

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Take the place of F.linear: x [..., in], weight [out, in] -> [..., out]."""
        out: Tensor = _Product.apply(x, weight, bias, self)
        return out

    def rows(self, numbers: Tensor, weight: Tensor) -> Tensor:
        """Take the place of F.embedding: numbers [...], weight [rows, width] -> [..., width]."""
        out: Tensor = _Rows.apply(numbers, weight, self)
        return out

    def add_product(self, grad: Tensor, x: Tensor) -> None:
        """Add grad^T x, a whole contribution: grad [tokens, out], x [tokens, in]."""
        self.accumulate(grad, x)
        self.done()

    def accumulate(self, grad: Tensor, x: Tensor) -> None:
        """Add grad^T x, a part of a contribution; `grad` may leave out the last rows of a padded vocabulary."""
        main, padding = self.main[:grad.shape[1]], self.main[grad.shape[1]:]
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
        if self.empty:
            self.main.zero_()
        self.main.index_put_((numbers,), grad.to(self.main.dtype), accumulate=True)
        self.empty = False
        self.done()


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sink: Sink) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sink = sink
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        flat = grads[0].flatten(0, -2)
        dx = (flat @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        if ctx.sink.put_off is None:
            ctx.sink.add_product(flat, x.flatten(0, -2))
        else:
            ctx.sink.put_off.append(partial(ctx.sink.add_product, flat, x.flatten(0, -2)))
        return dx, None, flat.sum(0) if ctx.needs_input_grad[2] else None, None


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
