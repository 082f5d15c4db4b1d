"""A backward in two halves: the input's gradient now (I), the weights' matrix products later (W)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from hpcpar.nn.transformer import Transformer

PutOff = Callable[[Tensor, Tensor], None]


class WeightGradients:
    """What a chunk's backward has put off: weight, input and output gradient of each matrix product."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply as F.linear does; backward leaves the weight's gradient to `take`."""
        out: Tensor = _Linear.apply(x, weight.detach(), bias, partial(self._put_off, weight))
        return out

    def _put_off(self, weight: Tensor, x: Tensor, grad: Tensor) -> None:
        self._waiting.append((weight, x, grad))

    def take(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Hand over what the last backward put off."""
        taken, self._waiting = self._waiting, []
        return taken


class _Linear(Function):
    """x [..., in] -> x weight^T + bias [..., out]; the weight comes detached, so that backward stops at it.

        F.linear   grad -> grad weight            (input)   B = all three in one node
                        -> grad^T x               (weight)
                        -> sum of grad            (bias)
        here       grad -> grad weight, sum of grad         I
                   (x, grad) kept -> grad^T x               W
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, put_off: PutOff) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.put_off, ctx.biased = put_off, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        ctx.put_off(x, grad)
        return grad @ weight, None, grad.flatten(0, -2).sum(0) if ctx.biased else None, None


def add_weight_gradients(taken: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Compute the weight gradients put off by a backward, and let autograd add them up where it always does."""
    for weight, x, grad in taken:
        weight.backward(grad.flatten(0, -2).t() @ x.flatten(0, -2))


def apply_split_backward(network: Transformer) -> WeightGradients:
    """Let a chunk's matrix products put off their weight gradients, in place.

    Norms, biases and embeddings stay with I: they are small, or have nobody to wait for.
    """
    gradients = WeightGradients()
    network.multiply = gradients.linear
    for block in network.blocks():
        block.attention.multiply = block.mlp.multiply = gradients.linear
    return gradients
