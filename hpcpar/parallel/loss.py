"""The loss and its gradients, a chunk of tokens at a time: the whole logits never stand in memory.

    a chunk   logits = x W^T  ->  loss, d logits in the logits' place  ->  dx = d logits W, bucket += d logits^T x

All of it happens in forward, while the chunk is there; backward only hands dx on. So a microbatch that waits for its
backward keeps [tokens, hidden] instead of [tokens, vocab], and what a chunk's gradients count must be known
in forward: `factor`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hpcpar.comm.collectives import gather_flat
from hpcpar.comm.groups import Group
from hpcpar.layout.loss import loss_chunks
from hpcpar.nn.linear import Vocabulary
from hpcpar.parallel.gradients import Sink


def chunk_loss(logits: Tensor, wanted: Tensor, scale: float, head: HeadLoss,
               with_grads: bool) -> tuple[Tensor, Tensor]:
    """Return the summed loss of a chunk's logits [tokens, rows], and their gradient in the logits' dtype.

    forward    lse = log sum over tp of exp(lse_r);  loss = lse - target logit
    backward   d logits = scale (exp(logits - lse) (1 + 2 z lse) - onehot), in the place of the logits
    """
    wide = logits.float() if logits.element_size() < 4 else logits
    here = (wanted >= 0) & (wanted < head.rows)
    index = (wanted * here)[:, None]
    target = wide.gather(1, index)[:, 0] * here
    top = wide.amax(1, keepdim=True)
    own = wide.sub_(top).exp_().sum(1).log_().add_(top[:, 0])  # log-sum-exp of this rank's rows
    lse = own
    if head.group is not None:
        everyones = own.new_empty(head.group.size(), 2, len(own))
        gather_flat(everyones, torch.stack((own, target)), head.group)
        lse, target = everyones[:, 0].logsumexp(0), everyones[:, 1].sum(0)
    loss = (lse - target).sum()
    if not with_grads:
        return loss, wide
    counts = (top[:, 0] - lse).exp_().mul_(scale)
    if head.z_loss:
        counts *= 1 + 2 * head.z_loss * lse
    wide.mul_(counts[:, None]).scatter_add_(1, index, here.to(wide.dtype).mul_(-scale)[:, None])
    return loss, wide.to(logits.dtype)


@dataclass(frozen=True)
class HeadLoss:
    """Takes the place of nn.transformer.head_loss where the head's gradient has a sink.

    This rank scores the vocabulary's rows [first_row, first_row + rows) of the `group`, which cuts it over tp.
    `chunk` is `chunk_loss`, plain or compiled.
    """

    rows: int
    z_loss: float
    first_row: int = 0
    group: Group | None = None
    chunk: Callable[[Tensor, Tensor, float, HeadLoss, bool], tuple[Tensor, Tensor]] = chunk_loss

    def __call__(self, x: Tensor, scores: Vocabulary, targets: Tensor, factor: float) -> Tensor:
        """Return factor x the mean loss of x [..., hidden] against targets [...], equal on all tp ranks.

        The gradients are already those of the result: it must not be scaled further. The matrix's are in its bucket
        before backward begins, also where a schedule puts other matrices' off. Cost: under tp one
        all-gather of two numbers a token for each of `layout.loss.loss_chunks`.
        """
        loss: Tensor = _HeadLoss.apply(x, scores.weight, targets, factor, self, scores.product,
                                       torch.is_grad_enabled())
        return loss


class _HeadLoss(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, factor: float, head: HeadLoss, sink: Sink,
                with_grads: bool) -> Tensor:
        flat, matrix, wanted = x.flatten(0, -2), weight[:head.rows], targets.flatten() - head.first_row
        sizes, scale = loss_chunks(len(flat), len(weight), weight.element_size()), factor / len(flat)
        dx = torch.empty_like(flat) if with_grads else None
        losses = []
        start = 0
        for size in sizes:
            chunk = slice(start, start + size)
            logits = flat[chunk] @ matrix.t()
            loss, grad = head.chunk(logits, wanted[chunk], scale, head, with_grads)
            losses.append(loss)
            if dx is not None:
                torch.mm(grad, matrix, out=dx[chunk])
                sink.accumulate(grad, flat[chunk])
            del logits, grad  # before the next chunk's take their place
            start += size
        if dx is not None:
            sink.done()
            ctx.save_for_backward(dx.view(x.shape))
        return torch.stack(losses).sum() * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.saved_tensors, None, None, None, None, None, None)
