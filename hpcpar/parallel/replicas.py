"""Replicas that must be bit-equal: what tp does not cut, what dp repeats, and the tied embedding's two ends."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from hpcpar.comm.collectives import gather_flat
from hpcpar.comm.groups import Group
from hpcpar.parallel.zero import ShardedOptimizer

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def bit_sum(x: Tensor) -> Tensor:
    """Return the sum of a tensor's bit patterns (int64, wrapping): any one changed bit changes it; no order matters."""
    return x.contiguous().view(_BITS[x.element_size()]).sum(dtype=torch.int64)


def find_drift(optimizer: ShardedOptimizer) -> str:
    """Compare what should be equal copies; return the tensor and the rank that differs from most, or an empty text.

    Every rank must call; only those that share the tensor see the difference. Cost: one pass over the weights, and 8
    bytes a tensor in one all-gather each over tp, dp, across a hybrid's runs of dp, and (tied) pp.
    """
    layout, groups = optimizer.layout, optimizer.groups
    mesh, rank = layout.mesh, layout.mesh.rank(groups.at)
    sums: dict[str, Tensor] = {}
    cut: set[str] = set()
    sharded: set[str] = set()  # over dp: nobody there has a copy
    for flat in optimizer.buckets:
        for slot in flat.bucket.slots:
            sums[slot.parameter.name] = bit_sum(flat.kept(slot))
            if slot.parameter.tp_dim is not None:
                cut.add(slot.parameter.name)
            if flat.gathers:
                sharded.add(slot.parameter.name)
    found = [_compare({n: s for n, s in sums.items() if n not in cut}, groups.tp, mesh.group("tp", rank), "tp"),
             _compare({n: s for n, s in sums.items() if n not in sharded}, groups.dp, mesh.members("dp", rank), "dp"),
             _compare(sums, groups.dp_across, mesh.members("dp_across", rank), "dp")]
    if layout.tied_across_stages:
        tied = "embedding.token.weight"
        ends = (0, mesh.pp_size - 1)
        zero = torch.zeros((), dtype=torch.int64, device=optimizer.buckets[0].own_weights.device)
        found.append(_compare({tied: sums.get(tied, zero)}, groups.pp_forward, mesh.group("pp", rank), "pp", ends))
    return next((text for text in found if text), "")


def _compare(sums: dict[str, Tensor], group: Group | None, ranks: tuple[int, ...], axis: str,
             places: tuple[int, ...] | None = None) -> str:
    """Gather the sums over a group and say where one of `places` (default: all) differs."""
    if group is None or not sums:
        return ""
    mine = torch.stack(list(sums.values()))
    everyones = mine.new_empty(group.size() * len(mine))
    gather_flat(everyones, mine, group)
    rows = everyones.view(-1, len(mine)).tolist()
    for column, name in enumerate(sums):
        found = {ranks[place]: rows[place][column] for place in places or range(len(rows))}
        votes = Counter(found.values())
        if len(votes) > 1:
            usual = votes.most_common(1)[0]
            odd = [other for other, value in found.items() if value != usual[0]]
            who = f"rank {odd[0]}" if usual[1] > len(odd) else f"rank {' or rank '.join(map(str, found))}"
            return f"{name} on {who} differs from its copies over {axis} (ranks {', '.join(map(str, found))})"
    return ""
