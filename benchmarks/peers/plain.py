"""The GPT on torch's own parallelism, over gloo: DistributedDataParallel, DTensor, torch.distributed.pipelining.

    dp    DistributedDataParallel where it is alone, else one all-reduce of all gradients after the last backward
    tp    DTensor by `parallelize_module`: column- and row-wise matrices, sequence-parallel norms, parallel loss
    pp    Schedule1F1B, or another schedule; the tied embedding's gradients are summed over its two stages
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt import GPT, adamw
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard, parallel
from torch.nn.parallel import DistributedDataParallel
from work import CLIP, HIDDEN, SEQ, VOCAB, Step, Weights, Work, rows


def open_program(work: Work, weights: Weights) -> Step:
    """Return this rank's training step."""
    return Plain(work, weights).step


def apply_tensor_parallelism(stage: GPT, mesh: DeviceMesh) -> None:
    """Replace a stage's parameters by DTensors; between stages and layers go local pieces of the sequence."""
    if stage.first:
        token, position = (parallel.RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(d)) for d in (1, 0))
        parallel.parallelize_module(stage, mesh, {"token": token, "position": position})
    whole = parallel.PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    for block in stage.blocks:
        parallel.parallelize_module(block, mesh, {
            "attention_norm": parallel.SequenceParallel(),
            "attention": whole,
            **{f"attention.{name}": parallel.ColwiseParallel() for name in "qkv"},
            "attention.out": parallel.RowwiseParallel(output_layouts=Shard(1)),
            "mlp_norm": parallel.SequenceParallel(),
            "mlp": whole,
            "mlp.up": parallel.ColwiseParallel(),
            "mlp.down": parallel.RowwiseParallel(output_layouts=Shard(1)),
        })
    if stage.last:
        head = parallel.ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1))
        parallel.parallelize_module(stage, mesh, {"norm": parallel.SequenceParallel(), "head": head})
    stage.tie()


class Plain:
    """A rank of the plain program."""

    def __init__(self, work: Work, weights: Weights, make_schedule: Callable[..., Any] = Schedule1F1B):
        tp, pp, dp, _, self.batch, size = work
        self.mesh = init_device_mesh("cpu", (pp, dp, tp), mesh_dim_names=("pp", "dp", "tp"))
        self.tp, self.pp, self.dp, self.own_batch = tp, pp, dp, work.own_batch
        self.dp_rank = self.mesh.get_local_rank("dp")
        pp_rank = self.mesh.get_local_rank("pp")
        self.stage = GPT(pp_rank, pp, weights)
        if tp > 1:
            apply_tensor_parallelism(self.stage, self.mesh["tp"])
        self.tied: Tensor | None = None
        if pp > 1:
            self._open_pipeline(pp_rank, size, make_schedule)
        self.model: nn.Module = DistributedDataParallel(self.stage) if dp > 1 and tp * pp == 1 else self.stage
        self.optimizer = adamw(self.stage)

    def _open_pipeline(self, pp_rank: int, size: int, make_schedule: Callable[..., Any]) -> None:
        """Make the schedule of microbatches of a size, and the group of the two stages with the tied embedding."""
        # shapes are given: finding them out by a trial run hangs where stages hold DTensors (torch 2.13 on gloo)
        between = torch.empty(size, SEQ // self.tp, HIDDEN, requires_grad=True)
        takes = torch.empty(size, SEQ, dtype=torch.int64) if self.stage.first else between
        gives = torch.empty(size, SEQ, VOCAB // self.tp, requires_grad=True) if self.stage.last else between
        stage = PipelineStage(self.stage, pp_rank, self.pp, torch.device("cpu"), group=self.mesh.get_group("pp"),
                              input_args=(takes,), output_args=(gives,))
        self.schedule = make_schedule(stage, self.own_batch // size, loss_fn=self.loss)
        ranks = self.mesh.mesh[[0, -1]].flatten(1).T.tolist()  # of every (dp, tp): its rank on the two end stages
        self.ends, _ = dist.new_subgroups_by_enumeration(ranks)
        if self.stage.first or self.stage.last:
            self.tied = self.stage.token.weight if self.stage.first else self.stage.head.weight

    def step(self, number: int) -> float | None:
        """Take a training step."""
        mine = rows(number * self.batch + self.dp_rank * self.own_batch, self.own_batch)
        tokens, targets = mine[:, :-1], mine[:, 1:]
        self.optimizer.zero_grad()
        with parallel.loss_parallel() if self.tp > 1 else nullcontext():
            loss = self.pipelined(tokens, targets) if self.pp > 1 else self.plain(tokens, targets)
        for parameter in self.stage.parameters():
            if isinstance(parameter.grad, DTensor):  # sum what is partial once, not in the norm and in AdamW again
                parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
        if self.tied is not None:
            dist.all_reduce(local(self.tied.grad), group=self.ends)
        if self.dp > 1 and self.model is self.stage:
            self.sum_over_dp()
        self.clip()
        self.optimizer.step()
        return loss

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.tp > 1:
            logits = DTensor.from_local(logits, self.mesh["tp"], [Shard(-1)])
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def plain(self, tokens: Tensor, targets: Tensor) -> float:
        loss = self.loss(self.model(tokens), targets)
        loss.backward()
        return float(local(loss.detach()))

    def pipelined(self, tokens: Tensor, targets: Tensor) -> float | None:
        losses: list[Tensor] = []
        if self.stage.first:
            self.schedule.step(tokens, return_outputs=False)
        elif self.stage.last:
            self.schedule.step(target=targets, losses=losses, return_outputs=False)
        else:
            self.schedule.step()
        return sum(float(local(x.detach())) for x in losses) / len(losses) if losses else None

    def sum_over_dp(self) -> None:
        grads = [local(p.grad) for p in self.stage.parameters()]
        run = torch.cat([grad.flatten() for grad in grads]).div_(self.dp)
        dist.all_reduce(run, group=self.mesh.get_group("dp"))
        for grad, total in zip(grads, run.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(total.view_as(grad))

    def clip(self) -> None:
        """Clip by the norm over all stages; the tied embedding counts on the first stage."""
        if self.pp == 1:
            nn.utils.clip_grad_norm_(self.stage.parameters(), CLIP, foreach=True)
            return
        copy = self.tied if self.stage.last else None
        grads = [p.grad for p in self.stage.parameters() if p is not copy]
        norm = nn.utils.get_total_norm(grads, foreach=True)
        squared = (norm.full_tensor() if isinstance(norm, DTensor) else norm).square()
        dist.all_reduce(squared, group=self.mesh.get_group("pp"))
        factor = float((CLIP / (squared.sqrt() + 1e-6)).clamp(max=1.0))
        for parameter in self.stage.parameters():
            local(parameter.grad).mul_(factor)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
