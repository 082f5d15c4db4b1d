"""Tensor parallelism, with or without sequence parallelism: what a stage's callables become under tp > 1."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from hpcpar.comm.collectives import copy_to, gather_flat, gather_sequence, reduce_from, scatter_sequence
from hpcpar.comm.groups import Group
from hpcpar.layout.boxes import shard_units
from hpcpar.layout.layout import Layout
from hpcpar.nn.linear import Vocabulary
from hpcpar.nn.transformer import Transformer


def apply_tensor_parallelism(stage: Transformer, layout: Layout, group: Group, tp_rank: int) -> None:
    """Set the exchanges around attention, MLP, embedding and head of a stage, in place.

    Cost a layer and microbatch: two all-reduces forward and two backward of [batch, seq, hidden] (as reduce-scatter
    and all-gather pairs under sequence parallelism); the loss all-gathers two numbers a token.
    """
    tp_size = layout.mesh.tp_size
    sequence = layout.sequence_parallel
    enter = partial(gather_sequence if sequence else copy_to, group=group)
    leave = partial(scatter_sequence if sequence else reduce_from, group=group)
    num_parts = tp_size if sequence else 1
    for block in stage.blocks():
        for part in (block.attention, block.mlp):
            part.enter, part.leave = enter, leave
        if sequence:
            block.attention.to_heads = partial(gathered_to_heads, num_parts=tp_size)
            block.attention.from_heads = partial(heads_to_gathered, num_parts=tp_size)
    first_row, rows = shard_units(stage.model.vocab, tp_size, tp_rank)
    if stage.first:
        stage.embedding.lookup = lambda table, tokens: leave(
            look_up_local(table, as_gathered(tokens, num_parts), first_row, rows))
        if sequence:
            stage.embedding.first_position = stage.model.seq // tp_size * tp_rank
    if stage.last:
        stage.enter_head = enter
        stage.vocab_rows = rows
        stage.token_loss = lambda logits, targets: vocabulary_parallel_loss(
            logits, as_gathered(targets, num_parts), group, first_row, stage.model.z_loss)


# Under sequence parallelism a gathered tensor holds [tp, batch, seq/tp] tokens, rank by rank. Matrices do not mind the
# order of tokens, so that only heads (1/tp as wide), tokens and targets are ever put in another order.

def as_gathered(tokens: Tensor, num_parts: int) -> Tensor:
    """Put tokens [batch, seq] in a gathered tensor's order: [num_parts x batch, seq / num_parts]."""
    batch, seq = tokens.shape
    return tokens.view(batch, num_parts, seq // num_parts).transpose(0, 1).flatten(0, 1)


def gathered_to_heads(x: Tensor, head_dim: int, num_parts: int) -> Tensor:
    """Map [num_parts x batch, seq / num_parts, heads x head_dim] to [batch, heads, seq, head_dim]."""
    rows, part = x.shape[:2]
    return x.view(num_parts, rows // num_parts, part, -1, head_dim).permute(1, 3, 0, 2, 4).flatten(2, 3)


def heads_to_gathered(x: Tensor, num_parts: int) -> Tensor:
    """Undo gathered_to_heads."""
    batch, heads, seq, head_dim = x.shape
    parts = x.view(batch, heads, num_parts, seq // num_parts, head_dim).permute(2, 0, 3, 1, 4)
    return parts.flatten(3).flatten(0, 1)


def look_up_local(table: Vocabulary, tokens: Tensor, first_row: int, rows: int) -> Tensor:
    """Look up the tokens [...] whose rows lie here; the others are zero: a partial sum over tp."""
    local = tokens - first_row
    here = (local >= 0) & (local < rows)
    return table.rows(local * here, table.weight) * here[..., None].to(table.weight.dtype)


class _VocabularyParallelLoss(Function):
    """Cross-entropy over logits cut by vocabulary: one all-gather of (log-sum-exp, target logit) a token.

    forward   lse = log sum_r exp(lse_r);  loss = mean(lse - target logit)
    backward  d logits = (exp(logits - lse) (1 + 2 z lse) - onehot) / tokens, local; z is the weight of the z-loss
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: Group, first_row: int,
                z_loss: float) -> Tensor:
        flat, local = logits.flatten(0, 1), targets.flatten() - first_row
        here = (local >= 0) & (local < flat.shape[1])
        index = (local * here)[:, None]
        mine = torch.stack((flat.logsumexp(1), flat.gather(1, index)[:, 0] * here))
        everyones = mine.new_empty(dist.get_world_size(group), *mine.shape)
        gather_flat(everyones, mine, group)
        lse = everyones[:, 0].logsumexp(0)
        ctx.save_for_backward(flat, lse, index, here)
        ctx.shape, ctx.z_loss = logits.shape, z_loss
        return (lse - everyones[:, 1].sum(0)).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        flat, lse, index, here = ctx.saved_tensors
        grad = torch.exp(flat - lse[:, None])
        if ctx.z_loss:
            grad *= 1 + 2 * ctx.z_loss * lse[:, None]
        grad.scatter_add_(1, index, -here[:, None].to(grad.dtype))
        return (grad * (grads[0] / flat.shape[0])).view(ctx.shape), None, None, None, None


def vocabulary_parallel_loss(logits: Tensor, targets: Tensor, group: Group, first_row: int,
                             z_loss: float = 0.0) -> Tensor:
    """Return the mean loss of logits [..., vocab/tp] against targets [...], equal on all tp ranks."""
    wide = logits.float() if logits.element_size() < 4 else logits
    loss: Tensor = _VocabularyParallelLoss.apply(wide, targets, group, first_row, z_loss)
    return loss
