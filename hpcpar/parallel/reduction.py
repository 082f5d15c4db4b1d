"""Gradients, from their contributions to the owned sums over dp.

    contribution   ->  added to the bucket's whole gradient, and counted; after the last: reduce-scatter over dp
    backward done  ->  wait; hybrid: owned shards are summed across; late buckets: over tp, or with the tied copy

ZeRO 0 and 1 keep whole gradients and reduce them once a step. ZeRO 2 and 3 lend a bucket a buffer with its first
contribution, reduce it whenever as many have come as a microbatch brings, and add the sum to the owned shard. So sums
cross dp once a microbatch, and whole gradients are there for the units only that a backward is at work on.
"""

from __future__ import annotations

from collections import defaultdict, deque

import torch
import torch.distributed as dist
from torch import Tensor

from hpcpar.comm.collectives import reduce_scatter_flat, zeros_of
from hpcpar.comm.groups import Group, Groups
from hpcpar.layout.buckets import Slot
from hpcpar.layout.layout import Layout
from hpcpar.parallel.buckets import FlatBucket
from hpcpar.parallel.gradients import Sink

UNDER_WAY = 2  # lent buffers in reductions that nobody has waited for


class Gradient:
    """One bucket's gradient while a step collects it."""

    def __init__(self, flat: FlatBucket, reduction: Reduction):
        self.flat, self._reduction = flat, reduction
        self.uses = 0  # contributions that a microbatch brings
        self.left = 0  # contributions still to come before the next reduction
        self.sinks: list[Sink] = []
        self.summed: list[Slot] = []  # those that autograd adds up: they start from zero
        self.whole = flat.grads
        self.fresh = True  # what lies in the owned sum is last step's
        self.sums = 0  # over dp, still to come in this step

    def begin(self, num_microbatches: int) -> None:
        """Forget the last step's gradient."""
        self.sums = num_microbatches if self._reduction.lends else 1
        self.left = self.uses * num_microbatches // self.sums
        self.fresh = True
        if not self._reduction.lends:
            self._clear()

    def part(self, slot: Slot) -> Tensor:
        """Return where a parameter's gradient is collected, in the main dtype."""
        if not self.whole.numel():
            self.whole = self._reduction.lend(self.flat.bucket.numel)
            self._clear()
        return self.flat.part(self.whole, slot)

    def count(self) -> None:
        """Note a contribution; the last one starts the sum over dp."""
        self.left -= 1
        if self.left == 0:
            self._reduction.start(self)

    def fill_gaps(self) -> None:
        """Zero what got no contribution: a tied embedding's two uses, of two microbatches, make up a count."""
        for sink in self.sinks:
            if sink.empty:
                sink.place().zero_()

    def _clear(self) -> None:
        for sink in self.sinks:
            sink.empty = True
        for slot in self.summed:
            self.flat.part(self.whole, slot).zero_()


class Reduction:
    """Sums all buckets' gradients of a step over who shares them."""

    def __init__(self, layout: Layout, groups: Groups, buckets: list[FlatBucket]):
        self.layout, self.groups = layout, groups
        self.lends = layout.shards_gradients
        self.gradients = [Gradient(flat, self) for flat in buckets]
        self._under_way: deque[tuple[dist.Work, Gradient, Tensor]] = deque()
        self._across: list[dist.Work] = []
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)  # buffers by length, to be lent again

    def lend(self, numel: int) -> Tensor:
        """Return a buffer [numel]; all dp ranks call in the same order, and get the same piece of shared memory."""
        if self._free[numel]:
            return self._free[numel].pop()
        own = self.gradients[0].flat.own_grads
        return zeros_of(self.groups.dp, numel, own.dtype, own.device)

    def start(self, gradient: Gradient) -> None:
        """Start the sum of a bucket over dp."""
        group, flat, whole = self.groups.dp, gradient.flat, gradient.whole
        if group is None:
            return
        if self.lends:
            gradient.fill_gaps()
        if self.layout.num_shards > 1:
            work = reduce_scatter_flat(whole[flat.start:flat.stop], whole, group, async_op=True)
        else:
            work = dist.all_reduce(whole, group=group, async_op=True)
        assert work is not None
        self._under_way.append((work, gradient, whole))
        if self.lends:
            gradient.whole, gradient.left = flat.grads, gradient.uses
        while (self.lends or self.groups.dp_across is not None) and len(self._under_way) > UNDER_WAY:
            self._take()

    def _take(self) -> None:
        """Wait for the oldest sum; one of a lent buffer goes to the owned shard."""
        work, gradient, whole = self._under_way.popleft()
        work.wait()
        if self.lends:
            flat, own = gradient.flat, whole[gradient.flat.start:gradient.flat.stop]
            flat.own_grads.copy_(own) if gradient.fresh else flat.own_grads.add_(own)
            gradient.fresh = False
            self._free[whole.numel()].append(whole)
        gradient.sums -= 1
        if self.groups.dp_across is not None:
            self._start_across(self.groups.dp_across)

    def _start_across(self, group: Group) -> None:
        """Hybrid sharding: sum, in the order of buckets, what has had its last sum with equal shards of other runs."""
        for gradient in self.gradients[len(self._across):]:
            if gradient.sums > 0:
                return
            work = dist.all_reduce(gradient.flat.own_grads, group=group, async_op=True)
            assert work is not None
            self._across.append(work)

    def finish(self) -> None:
        """Wait for all sums over dp, and do what late buckets need besides; all ranks of tp, pp and dp must call."""
        while self._under_way:
            self._take()
        for work in self._across:
            work.wait()
        self._across.clear()
        for gradient in self.gradients:
            if gradient.flat.bucket.late == "tied":
                self._add_tied_copy(gradient.flat)
            elif gradient.flat.bucket.late:
                self._sum_over_tp(gradient.flat)

    def _add_tied_copy(self, flat: FlatBucket) -> None:
        """Add the other end's gradient of the tied embedding: a + b equals b + a, so both ends stay bit-equal."""
        groups, first, last = self.groups, self.layout.chunk_ranks[0], self.layout.chunk_ranks[-1]
        other = torch.empty_like(flat.own_grads)
        if groups.at.pp_rank == first:
            sent = dist.isend(flat.own_grads, group=groups.pp_forward, group_dst=last)
            dist.recv(other, group=groups.pp_backward, group_src=last)
        else:
            sent = dist.isend(flat.own_grads, group=groups.pp_backward, group_dst=first)
            dist.recv(other, group=groups.pp_forward, group_src=first)
        assert sent is not None
        sent.wait()
        flat.own_grads += other

    def _sum_over_tp(self, flat: FlatBucket) -> None:
        """Sum a shard of partial gradients over tp.

        Kv heads shared by several tp ranks get places in a run that holds all kv heads: a rank fills only its own, and
        the sum over all ranks is the sum over those that share it. No further communicator is needed.
        """
        tp_size, own = self.layout.mesh.tp_size, flat.own_grads
        if flat.bucket.late == "tp":
            dist.all_reduce(own, group=self.groups.tp)
            return
        shared = flat.bucket.slots[0].parameter.shared_by(tp_size)
        heads = own.new_zeros(tp_size // shared, own.numel())
        place = heads[self.groups.at.tp_rank // shared]
        place.copy_(own)
        dist.all_reduce(heads, group=self.groups.tp)
        own.copy_(place)
