"""Tensor parallelism, with or without sequence parallelism: what a stage's callables become under tp > 1."""

from __future__ import annotations

from functools import partial
from typing import cast

from torch import Tensor

from hpcpar.comm.collectives import copy_to, gather_sequence, lent, reduce_from, scatter_sequence
from hpcpar.comm.groups import Group
from hpcpar.layout.boxes import shard_units
from hpcpar.layout.layout import Layout
from hpcpar.nn.linear import Vocabulary
from hpcpar.nn.transformer import Transformer
from hpcpar.parallel.gradients import Sink
from hpcpar.parallel.loss import HeadLoss
from hpcpar.parallel.overlap import Overlap, overlap_exchanges


def apply_tensor_parallelism(stage: Transformer, layout: Layout, group: Group, tp_rank: int) -> None:
    """Set the exchanges around attention, MLP, embedding and head of a stage, in place.

    Cost a layer and microbatch: two all-reduces forward and two backward of [batch, seq, hidden] (as reduce-scatter
    and all-gather pairs under sequence parallelism, each in layout.tp_overlap pieces); the loss all-gathers two
    numbers a token.
    """
    tp_size, pieces = layout.mesh.tp_size, layout.job.layout.tp_pieces
    sequence = layout.sequence_parallel
    enter = partial(gather_sequence if sequence else copy_to, group=group)
    leave = partial(scatter_sequence if sequence else reduce_from, group=group)
    num_parts = tp_size if sequence else 1
    for block in stage.blocks():
        if pieces > 1:
            overlap_exchanges(block, Overlap(group, pieces))
        else:
            for part in (block.attention, block.mlp):
                part.enter, part.leave = enter, leave
        if sequence:
            block.attention.to_heads = partial(gathered_to_heads, num_parts=tp_size, pieces=pieces)
            block.attention.from_heads = partial(heads_to_gathered, num_parts=tp_size, pieces=pieces)
    first_row, rows = shard_units(stage.model.vocab, tp_size, tp_rank)
    if stage.first:
        stage.embedding.lookup = lambda table, tokens: leave(
            look_up_local(table, as_gathered(tokens, num_parts), first_row, rows))
        if sequence:
            stage.embedding.first_position = stage.model.seq // tp_size * tp_rank
    if stage.last:
        stage.enter_head = enter
        stage.vocab_rows = rows
        loss = HeadLoss(rows, stage.model.z_loss, first_row, group)
        stage.head_loss = lambda x, scores, targets, factor: loss(x, scores, as_gathered(targets, num_parts), factor)


def compute_where_it_is_summed(stage: Transformer, group: Group) -> None:
    """Let products whose results are reduce-scattered write them into memory that the group shares, in place."""
    room = partial(lent, group=group)
    for block in stage.blocks():
        for last in (block.attention.out, block.mlp.down):
            cast(Sink, last.product).output_room = room
        for first in (block.attention.q, block.mlp.gate or block.mlp.up):
            cast(Sink, first.product).input_room = room


# Under sequence parallelism a gathered tensor holds [tp, batch, seq/tp] tokens, rank by rank; within a layer whose
# exchanges are in pieces [pieces, tp, batch, seq/tp/pieces]. Matrices do not mind the order of tokens, so that only
# heads (1/tp as wide), tokens and targets are ever put in another order.

def as_gathered(tokens: Tensor, num_parts: int) -> Tensor:
    """Put tokens [batch, seq] in a gathered tensor's order: [num_parts x batch, seq / num_parts]."""
    batch, seq = tokens.shape
    return tokens.view(batch, num_parts, seq // num_parts).transpose(0, 1).flatten(0, 1)


def gathered_to_heads(x: Tensor, head_dim: int, num_parts: int, pieces: int = 1) -> Tensor:
    """Map [pieces x num_parts x batch, seq / num_parts / pieces, heads x head_dim] to [batch, heads, seq, head_dim]."""
    rows, part = x.shape[:2]
    tokens = x.view(pieces, num_parts, rows // num_parts // pieces, part, -1, head_dim)
    return tokens.permute(2, 4, 1, 0, 3, 5).flatten(2, 4)


def heads_to_gathered(x: Tensor, num_parts: int, pieces: int = 1) -> Tensor:
    """Undo gathered_to_heads."""
    batch, heads, seq, head_dim = x.shape
    parts = x.view(batch, heads, num_parts, pieces, seq // num_parts // pieces, head_dim)
    return parts.permute(3, 2, 0, 4, 1, 5).flatten(4).flatten(0, 2)


def look_up_local(table: Vocabulary, tokens: Tensor, first_row: int, rows: int) -> Tensor:
    """Look up the tokens [...] whose rows lie here; the others are zero: a partial sum over tp."""
    local = tokens - first_row
    here = (local >= 0) & (local < rows)
    return table.rows(local * here, table.weight) * here[..., None].to(table.weight.dtype)
