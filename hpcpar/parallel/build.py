"""All of it applied to the plain network, in one visible order."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hpcpar.comm.groups import Groups
from hpcpar.comm.p2p import Neighbours
from hpcpar.config.resolve import compiles
from hpcpar.layout.layout import Layout
from hpcpar.nn.init import initial_values
from hpcpar.nn.transformer import Transformer
from hpcpar.parallel.gathering import apply_gathering
from hpcpar.parallel.gradients import PutOff, project
from hpcpar.parallel.loss import HeadLoss, chunk_loss
from hpcpar.parallel.offload import Offload
from hpcpar.parallel.pipeline import Pipeline
from hpcpar.parallel.recompute import apply_recompute
from hpcpar.parallel.tensor import apply_tensor_parallelism, compute_where_it_is_summed
from hpcpar.parallel.zero import ShardedOptimizer

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build(layout: Layout, groups: Groups, device: torch.device,
          note: Callable[[str], None] = lambda action: None) -> tuple[Pipeline, ShardedOptimizer]:
    """Build this rank's part of the model, with uninitialised weights (zeros): `initialise` or a checkpoint fills them.

    No tensor of global size is ever allocated: the network is made on the meta device and its parameters replaced by
    views of the rank's flat buckets.
    """
    job, at = layout.job, groups.at
    dtype = DTYPES[job.train.precision]
    last, compiled = len(layout.chunks) - 1, compiles(job, on_gpu=device.type == "cuda")
    with torch.device("meta"):
        chunks = {chunk: Transformer(job.model, layout.chunks[chunk], first=chunk == 0, last=chunk == last)
                  for chunk in layout.chunks_of(at.pp_rank)}
    put_off: PutOff | None = [] if layout.splits_backward else None
    optimizer = ShardedOptimizer(layout, groups, chunks, dtype, device, put_off)
    offload = Offload(device) if job.layout.recompute == "offload" else None
    for network in chunks.values():
        network.head_loss = HeadLoss(job.model.vocab, job.model.z_loss,
                                     chunk=torch.compile(chunk_loss) if compiled else chunk_loss)
        if not compiled:  # the compiler sees no sinks
            for block in network.blocks():
                block.attention.project = block.mlp.project = project
        if groups.tp is not None:
            apply_tensor_parallelism(network, layout, groups.tp, at.tp_rank)
        overlapped = layout.job.layout.tp_pieces > 1
        if compiled:
            _compile(network, overlapped, whole_layers=groups.tp is None and
                     job.model.dropout == 0 and job.layout.recompute != "selective")
        elif layout.sequence_parallel and groups.tp is not None and not overlapped:
            compute_where_it_is_summed(network, groups.tp)  # the compiler does not see memory that comes back by itself
        if offload is not None:
            offload.run_blocks_of(network)
        else:
            apply_recompute(network, job.layout.recompute, overlapped)
        apply_gathering(network, layout, optimizer.buckets)
    seq = job.model.seq // layout.mesh.tp_size if layout.sequence_parallel else job.model.seq
    neighbours = Neighbours(groups, layout.chunk_ranks, dtype, device)
    return Pipeline(chunks, neighbours, (seq, job.model.hidden), note, put_off), optimizer


def initialise(optimizer: ShardedOptimizer, seed: int) -> None:
    """Give the weights their first values; a dp rank computes only the shard that it owns."""
    device = optimizer.buckets[0].own_weights.device
    optimizer.fill(lambda piece: initial_values(piece.parameter, piece.box, seed, device))


def _compile(stage: Transformer, overlapped: bool, whole_layers: bool) -> None:
    """Compile every layer, or what lies between its exchanges, and the products that they overlap with."""
    for block in stage.blocks():
        if whole_layers:
            block.compile()
        elif overlapped:
            block.attention.mix = torch.compile(block.attention.mix)
            block.mlp.activate = torch.compile(block.mlp.activate)
        else:
            block.attention.compute = torch.compile(block.attention.compute)
            block.mlp.compute = torch.compile(block.mlp.compute)
