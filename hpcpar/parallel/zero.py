"""The sharded optimizer (ZeRO): owns a stage's parameters, has gradients summed, updates the owned shard.

    gradients  ->  parallel/reduction: owned sums over dp
    norm, clip ->  AdamW on the owned shard
    weights    ->  all-gather over dp (ZeRO 1 and 2), or unit by unit when they are used (parallel/gathering, ZeRO 3)

Bytes a step and rank, of gradients and weights, in (d-1)/d, with m microbatches: ZeRO 1: 1 + 1; ZeRO 2: m + 1; ZeRO 3:
m + 2 m, embedding and head m + m. Source: Rajbhandari et al. 2020, arXiv 1910.02054.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from hpcpar.comm.collectives import gather_flat, wait
from hpcpar.comm.groups import Groups
from hpcpar.config.resolve import compiles
from hpcpar.layout.buckets import Piece, Slot
from hpcpar.layout.layout import Layout
from hpcpar.nn.linear import Linear, Vocabulary
from hpcpar.nn.transformer import Transformer
from hpcpar.optim.adamw import AdamW, Run
from hpcpar.parallel.buckets import KINDS, FlatBucket
from hpcpar.parallel.gradients import PutOff, Sink
from hpcpar.parallel.reduction import Gradient, Reduction

_NORM_CHUNK = 1 << 16  # elements whose squares are summed at a time on CPU: their float64 copies stay in the cache


class ShardedOptimizer:
    """Owns a stage's weights, gradients and optimizer state as flat buckets."""

    def __init__(self, layout: Layout, groups: Groups, chunks: Mapping[int, Transformer], dtype: torch.dtype,
                 device: torch.device, put_off: PutOff | None = None):
        at = groups.at
        self.layout, self.groups = layout, groups
        index, self._copy = layout.shard_of(at)
        self.buckets = [FlatBucket(b, layout, index, dtype, device, groups.dp)
                        for b in layout.buckets(at.pp_rank, at.tp_rank)]
        self.pieces = layout.held_pieces(layout.mesh.rank(at))
        self._put_off = put_off
        self._reduction = Reduction(layout, groups, self.buckets)
        for gradient in self._reduction.gradients:
            gradient.uses = sum(self._bind(chunks, gradient, slot) for slot in gradient.flat.bucket.slots)
        self._adamw = AdamW([run for flat in self.buckets for run in _runs(flat)], layout.job.optim)

    def _bind(self, chunks: Mapping[int, Transformer], gradient: Gradient, slot: Slot) -> int:
        """Make a parameter a view of its bucket in every chunk that has it, and let its gradient be gathered there.

        Returns how many contributions a microbatch brings.
        """
        path, _, leaf = slot.parameter.name.rpartition(".")
        holders = [network for network in chunks.values() if slot.parameter.name in dict(network.named_parameters())]
        modules = [network.get_submodule(path) for network in holders]
        parameter = gradient.flat.make_parameter(slot)
        for module in modules:
            setattr(module, leaf, parameter)

        # the compiler cannot see through a product that writes where it was not told to; it sees no vocabulary, and no
        # products that exchanges overlap with
        job = self.layout.job
        compiled = compiles(job, on_gpu=gradient.flat.own_grads.is_cuda) and job.layout.tp_pieces == 1
        takes_sink = Vocabulary if compiled else Linear | Vocabulary
        matrices = [module for module in modules if isinstance(module, takes_sink)]
        sink = Sink(partial(gradient.part, slot), gradient.count, self._put_off)
        gradient.sinks.append(sink)
        if leaf == "weight" and matrices:
            for matrix in matrices:
                matrix.product = sink
                if isinstance(matrix, Vocabulary):
                    matrix.rows = sink.rows
            both = [n for n in holders if slot.parameter.is_vocabulary and n.first and n.last and n.model.tied]
            return len(holders) + len(both)

        # Python cannot see what a hook holds: by its own sink a parameter would keep itself for ever
        seen = weakref.proxy(sink)

        def added(p: Tensor) -> None:
            if p.grad is in_place:
                seen.done()
            else:
                seen.add(p.grad)
                p.grad = None

        in_place = None
        if gradient.whole.numel() and gradient.whole.dtype == parameter.dtype:
            in_place = parameter.grad = gradient.part(slot)  # autograd adds into it
            gradient.summed.append(slot)
        parameter.register_post_accumulate_grad_hook(added)
        return len(holders)

    def begin(self, num_microbatches: int) -> None:
        """Forget the last step's gradients."""
        for gradient in self._reduction.gradients:
            gradient.begin(num_microbatches)

    def finish_reduction(self) -> None:
        """Wait for all sums of gradients; all ranks of tp, pp and dp must call."""
        self._reduction.finish()

    def norm_squared(self) -> Tensor:
        """Return this rank's share of the squared global gradient norm (float64): every element counts once."""
        at = self.groups.at
        total = torch.zeros((), dtype=torch.float64, device=self.buckets[0].own_grads.device)
        if self._copy > 0:
            return total
        for flat in self.buckets:
            counted = {s.parameter.name: self.layout.counts(s.parameter, at.pp_rank, at.tp_rank)
                       for s in flat.bucket.slots}
            for start, stop in flat.owned_runs(counted):
                owned = flat.own_grads[start:stop]
                for part in owned.split(_NORM_CHUNK) if owned.device.type == "cpu" else [owned]:
                    total += torch.linalg.vector_norm(part, dtype=torch.float64).square()
        return total

    def update(self, lr: float, num_updates: int, grad_factor: float) -> None:
        """Scale the owned gradients, update the owned shard, and gather the weights over dp."""
        if grad_factor != 1:
            for flat in self.buckets:
                flat.own_grads.mul_(grad_factor)
        self._adamw.update(lr, num_updates)
        self.publish_weights()

    def publish_weights(self) -> None:
        """Copy the master shard into the weights and, where whole ones are kept, all-gather it over dp."""
        works = []
        for flat in self.buckets:
            if flat.shard["weight"].dtype != flat.own_weights.dtype:
                flat.own_weights.copy_(flat.shard["weight"])
            if self.groups.dp is not None and self.layout.num_shards > 1 and not flat.gathers:
                works.append(gather_flat(flat.weights, flat.own_weights, self.groups.dp, async_op=True))
        for work in works:
            wait(work)

    def fill(self, value_of: Callable[[Piece], Tensor]) -> None:
        """Set the owned master weights piece by piece, and publish them; the moments stay as they are."""
        for piece in self.pieces:
            target = self.buckets[piece.bucket].shard["weight"]
            target[piece.start:piece.start + piece.box.numel].copy_(value_of(piece).flatten())
        self.publish_weights()

    def shards(self) -> dict[str, list[Tensor]]:
        """Return the owned shards by kind and bucket: what a checkpoint stores and a resume fills (then publish)."""
        return {kind: [flat.shard[kind] for flat in self.buckets] for kind in KINDS}


def _runs(flat: FlatBucket) -> list[Run]:
    """Cut an owned shard into runs with and without weight decay; padding is in none."""
    runs = []
    for decayed in (True, False):
        wanted = {slot.parameter.name: slot.parameter.decayed == decayed for slot in flat.bucket.slots}
        for start, stop in flat.owned_runs(wanted):
            shard = [flat.shard[kind][start:stop] for kind in KINDS]
            runs.append(Run(shard[0], flat.own_grads[start:stop], shard[1], shard[2], decayed))
    return runs
