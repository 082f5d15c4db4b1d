"""One bucket's tensors on a rank: flat weights, gradients, and the owned shard's master weights and moments."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpcpar.comm.collectives import gather_flat, shared_zeros, zeros_of
from hpcpar.comm.groups import Group
from hpcpar.layout.buckets import Bucket, Slot
from hpcpar.layout.layout import Layout

KINDS = ("weight", "exp_avg", "exp_avg_sq")  # what a shard consists of, as a checkpoint stores it


class FlatBucket:
    """The storage behind a bucket's parameters.

    weights [numel] in the parameters' dtype; grads [numel] in the main dtype (fp32, or fp64); shard tensors
    [numel / num_shards] in the main dtype. Where both dtypes are equal the master weights are the weights themselves.
    Where gradients are sharded `grads` is empty: a buffer is lent while a backward needs it. Where weights are, and
    memory does not hold them in common, `weights` is empty but between `start_gather` and `release`.
    """

    def __init__(self, bucket: Bucket, layout: Layout, index: int, dtype: torch.dtype, device: torch.device,
                 group: Group | None = None):
        """Allocate it for a rank that owns shard `index`; all ranks of `group`, which share the bucket, must call."""
        main = torch.float64 if dtype == torch.float64 else torch.float32
        self.bucket, self._group = bucket, group
        self.start, self.stop = bucket.shard(layout.num_shards, index)
        # weights are written between two collectives only, each part by its owner: one memory can serve a whole host
        common = shared_zeros(group, bucket.numel, dtype, device, common=True) if layout.num_shards > 1 else None
        self.gathers = layout.shards_weights and common is None
        kept = self.stop - self.start if self.gathers else bucket.numel
        self._kept = torch.zeros(kept, dtype=dtype, device=device) if common is None else common
        self.weights = self._kept.new_empty(0) if self.gathers else self._kept
        self.own_weights = self._kept if self.gathers else self._kept[self.start:self.stop]
        if layout.shards_gradients:
            self.grads = torch.empty(0, dtype=main, device=device)
            self.own_grads = torch.zeros_like(self.own_weights, dtype=main)
        else:
            self.grads = zeros_of(group, bucket.numel, main, device)
            self.own_grads = self.grads[self.start:self.stop]
        owned = self.own_weights
        self.shard = {"weight": owned if dtype == main else torch.zeros_like(owned, dtype=main)}
        for kind in KINDS[1:]:
            self.shard[kind] = torch.zeros_like(owned, dtype=main)
        self._parameters: list[tuple[Slot, nn.Parameter]] = []
        # stands for weights that are not here, in their shape: to compute with them shows
        self._absent = torch.full((), math.nan, dtype=dtype, device=device)

    def make_parameter(self, slot: Slot) -> nn.Parameter:
        """Make the parameter that is a view of the weights, wherever these come to lie."""
        here = self._absent.expand(slot.local_shape) if self.gathers else self.part(self.weights, slot)
        parameter = nn.Parameter(here)
        self._parameters.append((slot, parameter))
        return parameter

    def start_gather(self) -> dist.Work | None:
        """Begin to gather the whole weights, which are there when the work is done; all ranks of the group must call.

        Cost: (d-1)/d of their bytes, which then stay until `release`.
        """
        self.weights = self.own_weights.new_empty(self.bucket.numel)
        for slot, parameter in self._parameters:
            parameter.data = self.part(self.weights, slot)
        assert self._group is not None
        return gather_flat(self.weights, self.own_weights, self._group, async_op=True)

    def release(self) -> None:
        """Keep the owned weights only."""
        self.weights = self.own_weights.new_empty(0)
        for slot, parameter in self._parameters:
            parameter.data = self._absent.expand(slot.local_shape)

    def whole_weights(self) -> Tensor:
        """Return all weights, gathered if need be; all ranks of the group must call."""
        if not self.gathers or self._group is None:
            return self.weights
        whole = self.own_weights.new_empty(self.bucket.numel)
        gather_flat(whole, self.own_weights, self._group)
        return whole

    def kept(self, slot: Slot) -> Tensor:
        """Return what this rank keeps of a parameter's weights, flat: all of it, or the owned part."""
        first = self.start if self.gathers else 0
        return self._kept[max(0, slot.start - first):max(0, slot.start + slot.numel - first)]

    def kept_tensors(self) -> dict[str, list[Tensor]]:
        """Return what is kept between steps, by category; one storage may stand in several."""
        grads = self.grads if self.grads.numel() else self.own_grads
        return {"weights": [self._kept], "gradients": [grads], "master": [self.shard["weight"]],
                "moments": [self.shard["exp_avg"], self.shard["exp_avg_sq"]]}

    def part(self, flat: Tensor, slot: Slot) -> Tensor:
        """Return a parameter's view in a flat tensor of this bucket."""
        return flat[slot.start:slot.start + slot.numel].view(slot.local_shape)

    def owned_runs(self, wanted: dict[str, bool]) -> list[tuple[int, int]]:
        """Return merged (start, stop) runs, relative to the shard, of the slots whose name maps to True."""
        runs: list[tuple[int, int]] = []
        for slot in self.bucket.slots:
            low, high = max(slot.start, self.start), min(slot.start + slot.numel, self.stop)
            if low >= high or not wanted[slot.parameter.name]:
                continue
            if runs and runs[-1][1] == low - self.start:
                runs[-1] = (runs[-1][0], high - self.start)
            else:
                runs.append((low - self.start, high - self.start))
        return runs
