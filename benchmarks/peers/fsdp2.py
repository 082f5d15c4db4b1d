"""The GPT on torch's FSDP2 (`fully_shard`) over dp: a block a unit, its gathered weights freed after forward or kept.

ZeRO-3 gathers a block's weights for its forward and again for its backward; ZeRO-2 keeps them in between.
"""

from __future__ import annotations

import torch.distributed as dist
import torch.nn.functional as F
from gpt import GPT, adamw
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from work import CLIP, Step, Weights, Work, rows


def open_program(work: Work, weights: Weights) -> Step:
    """Return this rank's training step."""
    assert work.tp == work.pp == 1 and work.zero in (2, 3)
    mesh, model = init_device_mesh("cpu", (work.dp,)), GPT(0, 1, weights)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=work.zero == 3)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)  # embedding and head: used again at once
    optimizer = adamw(model)

    def step(number: int) -> float:
        mine = rows(number * work.batch + dist.get_rank() * work.own_batch, work.own_batch)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(mine[:, :-1]).flatten(0, 1), mine[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
        optimizer.step()
        return float(loss.detach())

    return step
