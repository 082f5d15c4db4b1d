"""The sharded optimizer (ZeRO-1): reduces gradients over dp, updates the owned shard, gathers the weights.

    last gradient  ->  reduce-scatter over dp (early buckets, while backward goes on)
    backward done  ->  late buckets: sum over tp, or with the tied copy; then reduce-scatter
    norm, clip     ->  AdamW on the owned shard -> all-gather over dp

Bytes a step and rank: 2 (d-1)/d of the gradients and weights. Source: Rajbhandari et al. 2020, arXiv 1910.02054.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpcpar.comm.collectives import gather_flat, reduce_scatter_flat
from hpcpar.comm.groups import Groups
from hpcpar.config.resolve import compiles
from hpcpar.layout.buckets import Piece, Slot
from hpcpar.layout.layout import Layout
from hpcpar.nn.linear import Linear, Vocabulary
from hpcpar.nn.transformer import Transformer
from hpcpar.optim.adamw import AdamW, Run
from hpcpar.parallel.buckets import KINDS, FlatBucket
from hpcpar.parallel.gradients import PutOff, Sink


class ShardedOptimizer:
    """Owns a stage's weights, gradients and optimizer state as flat buckets."""

    def __init__(self, layout: Layout, groups: Groups, chunks: Mapping[int, Transformer], dtype: torch.dtype,
                 device: torch.device, put_off: PutOff | None = None):
        at = groups.at
        self.layout, self.groups = layout, groups
        index = at.dp_rank if layout.num_shards > 1 else 0
        self.buckets = [FlatBucket(b, layout.num_shards, index, dtype, device, groups.dp)
                        for b in layout.buckets(at.pp_rank, at.tp_rank)]
        self.pieces = layout.held_pieces(layout.mesh.rank(at))
        self._put_off = put_off
        self._works: list[dist.Work] = []
        self._pending: list[int] = []  # by bucket: contributions that the step has still to bring
        self._uses: list[int] = []  # by bucket: contributions that a microbatch brings
        self._sinks: list[Sink] = []
        self._summed: list[Tensor] = []  # gradients that autograd adds up: they start from zero
        for number, flat in enumerate(self.buckets):
            self._uses.append(sum(self._bind(chunks, number, slot) for slot in flat.bucket.slots))
        self._adamw = AdamW([run for flat in self.buckets for run in _runs(flat)], layout.job.optim)

    def _bind(self, chunks: Mapping[int, Transformer], number: int, slot: Slot) -> int:
        """Make a parameter a view of its bucket in every chunk that has it, and let its gradient be gathered there.

        Returns how many contributions a microbatch brings.
        """
        flat = self.buckets[number]
        path, _, leaf = slot.parameter.name.rpartition(".")
        holders = [network for network in chunks.values() if slot.parameter.name in dict(network.named_parameters())]
        modules = [network.get_submodule(path) for network in holders]
        parameter, main = nn.Parameter(flat.part(flat.weights, slot)), flat.part(flat.grads, slot)
        for module in modules:
            setattr(module, leaf, parameter)

        def added(p: Tensor | None = None) -> None:
            if p is not None and p.grad is not main:  # of another dtype
                assert p.grad is not None
                main.add_(p.grad)
                p.grad = None
            self._pending[number] -= 1
            if self._pending[number] == 0 and not flat.bucket.late:
                self._reduce(flat)

        # the compiler cannot see through a product that writes where it was not told to; it sees no vocabulary
        takes_sink = Vocabulary if compiles(self.layout.job, on_gpu=main.is_cuda) else Linear | Vocabulary
        matrices = [module for module in modules if isinstance(module, takes_sink)]
        if leaf == "weight" and matrices:
            sink = Sink(main, added, self._put_off)
            for matrix in matrices:
                matrix.product = sink
                if isinstance(matrix, Vocabulary):
                    matrix.rows = sink.rows
            self._sinks.append(sink)
            both = [n for n in holders if slot.parameter.is_vocabulary and n.first and n.last and n.model.tied]
            return len(holders) + len(both)
        if main.dtype == parameter.dtype:
            parameter.grad = main  # autograd adds into it in place
        parameter.register_post_accumulate_grad_hook(added)
        self._summed.append(main)
        return len(holders)

    def begin(self, num_microbatches: int) -> None:
        """Forget the last step's gradients; a bucket is reduced when this step's last one for it is there."""
        self._pending = [uses * num_microbatches for uses in self._uses]
        for sink in self._sinks:
            sink.empty = True
        torch._foreach_zero_(self._summed)

    def _reduce(self, flat: FlatBucket) -> None:
        """Start the sum of a bucket over dp."""
        group = self.groups.dp
        if group is None:
            return
        if self.layout.num_shards > 1:
            work = reduce_scatter_flat(flat.own_grads, flat.grads, group, async_op=True)
        else:
            work = dist.all_reduce(flat.grads, group=group, async_op=True)
        assert work is not None
        self._works.append(work)

    def finish_reduction(self) -> None:
        """Wait for the early buckets, and do the late ones; all ranks of tp, pp and dp must call."""
        for flat in self.buckets:
            if flat.bucket.late:
                if flat.bucket.slots[0].parameter.is_vocabulary:
                    self._add_tied_copy(flat)
                else:
                    self._sum_over_tp(flat)
                self._reduce(flat)
        for work in self._works:
            work.wait()
        self._works.clear()

    def _add_tied_copy(self, flat: FlatBucket) -> None:
        """Add the other end's gradient of the tied embedding: a + b equals b + a, so both ends stay bit-equal."""
        groups, first, last = self.groups, self.layout.chunk_ranks[0], self.layout.chunk_ranks[-1]
        other = torch.empty_like(flat.grads)
        if groups.at.pp_rank == first:
            sent = dist.isend(flat.grads, group=groups.pp_forward, group_dst=last)
            dist.recv(other, group=groups.pp_backward, group_src=last)
        else:
            sent = dist.isend(flat.grads, group=groups.pp_backward, group_dst=first)
            dist.recv(other, group=groups.pp_forward, group_src=first)
        assert sent is not None
        sent.wait()
        flat.grads += other

    def _sum_over_tp(self, flat: FlatBucket) -> None:
        """Sum partial gradients over tp, in one all-reduce of one flat run.

        A kv head shared by several tp ranks gets a place in a run that holds all kv heads: a rank fills only its
        own, and the sum over all ranks is the sum over those that share it. No further communicator is needed.
        """
        mesh, tp_rank = self.layout.mesh, self.groups.at.tp_rank
        parts = []
        for slot in flat.bucket.slots:
            grad = flat.part(flat.grads, slot).flatten()
            shared = slot.parameter.shared_by(mesh.tp_size)
            if shared > 1:
                heads = grad.new_zeros(mesh.tp_size // shared, grad.numel())
                heads[tp_rank // shared] = grad
                grad = heads.flatten()
            parts.append(grad)
        run = torch.cat(parts)
        dist.all_reduce(run, group=self.groups.tp)
        for slot, total in zip(flat.bucket.slots, run.split([p.numel() for p in parts]), strict=True):
            mine = total.view(-1, slot.numel)
            row = tp_rank // slot.parameter.shared_by(mesh.tp_size) if mine.shape[0] > 1 else 0
            flat.part(flat.grads, slot).copy_(mine[row].view(slot.local_shape))

    def norm_squared(self) -> Tensor:
        """Return this rank's share of the squared global gradient norm (float64): every element counts once."""
        at = self.groups.at
        total = torch.zeros((), dtype=torch.float64, device=self.buckets[0].grads.device)
        if self.layout.num_shards == 1 and at.dp_rank > 0:
            return total
        for flat in self.buckets:
            counted = {s.parameter.name: self.layout.counts(s.parameter, at.pp_rank, at.tp_rank)
                       for s in flat.bucket.slots}
            for start, stop in flat.owned_runs(counted):
                total += torch.linalg.vector_norm(flat.own_grads[start:stop], dtype=torch.float64).square()
        return total

    def update(self, lr: float, num_updates: int, grad_factor: float) -> None:
        """Scale the owned gradients, update the owned shard, and gather the weights over dp."""
        if grad_factor != 1:
            for flat in self.buckets:
                flat.own_grads.mul_(grad_factor)
        self._adamw.update(lr, num_updates)
        self.publish_weights()

    def publish_weights(self) -> None:
        """Copy the master shard into the weights and all-gather it over dp."""
        for flat in self.buckets:
            if flat.shard["weight"].dtype != flat.weights.dtype:
                flat.own_weights.copy_(flat.shard["weight"])
            if self.groups.dp is not None and self.layout.num_shards > 1:
                gather_flat(flat.weights, flat.own_weights, self.groups.dp)

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
