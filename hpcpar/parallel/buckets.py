"""One bucket's tensors on a rank: flat weights, gradients, and the owned shard's master weights and moments."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcpar.comm.collectives import zeros_of
from hpcpar.comm.groups import Group
from hpcpar.layout.buckets import Bucket, Slot

KINDS = ("weight", "exp_avg", "exp_avg_sq")  # what a shard consists of, as a checkpoint stores it


class FlatBucket:
    """The storage behind a bucket's parameters.

    weights [numel] in the parameters' dtype; grads [numel] in the main dtype (fp32, or fp64); shard tensors
    [numel / num_shards] in the main dtype. Where both dtypes are equal the master weights are the weights themselves.
    """

    def __init__(self, bucket: Bucket, num_shards: int, index: int, dtype: torch.dtype, device: torch.device,
                 group: Group | None = None):
        """Allocate it for a rank that owns shard `index`; all ranks of `group`, which share the bucket, must call."""
        main = torch.float64 if dtype == torch.float64 else torch.float32
        self.bucket = bucket
        self.start, self.stop = bucket.shard(num_shards, index)
        # weights are written between two collectives only, each part by its owner: one memory can serve a whole host
        self.weights = zeros_of(group, bucket.numel, dtype, device, common=num_shards > 1)
        self.grads = zeros_of(group, bucket.numel, main, device)
        owned = self.weights[self.start:self.stop]
        self.shard = {"weight": owned if dtype == main else torch.zeros_like(owned, dtype=main)}
        for kind in KINDS[1:]:
            self.shard[kind] = torch.zeros_like(owned, dtype=main)

    @property
    def own_weights(self) -> Tensor:
        """The owned part of the weights: what other dp ranks get from this one."""
        return self.weights[self.start:self.stop]

    @property
    def own_grads(self) -> Tensor:
        """The owned part of the gradients: reduced over dp in place."""
        return self.grads[self.start:self.stop]

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
