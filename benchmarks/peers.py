"""The same GPT on the same layouts, written with what torch.distributed offers, over gloo; no hpcpar in here.

    MASTER_PORT=29511 mpirun -n 8 python benchmarks/peers.py TP PP DP [--batch 8] [--steps 3]

    dp    DistributedDataParallel where it is alone, else one all-reduce of all gradients after the last backward
    tp    DTensor by `parallelize_module`: column- and row-wise matrices, sequence-parallel norms, parallel loss
    pp    torch.distributed.pipelining, Schedule1F1B; the tied embedding's gradients are summed over its two stages

Prints {"seconds_per_step": ..., "first_loss": ...} from rank 0.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard, parallel
from torch.nn.parallel import DistributedDataParallel

HIDDEN, LAYERS, HEADS, SEQ, VOCAB = 512, 8, 8, 256, 8192
WARM_UP = 2  # steps that are not timed


def rows(first: int, count: int) -> Tensor:
    """Samples [first, first + count) of the benchmark's data: [count, seq + 1] random tokens, equal on all sides."""
    pool = torch.randint(VOCAB, (256, SEQ + 1), generator=torch.Generator().manual_seed(1))
    return pool[torch.arange(first, first + count) % len(pool)]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, seq = x.shape[:2]
        q, k, v = (p(x).view(batch, seq, -1, HIDDEN // HEADS).transpose(1, 2) for p in (self.q, self.k, self.v))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(heads.transpose(1, 2).reshape(batch, seq, -1))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(HIDDEN), Attention()
        self.mlp_norm, self.mlp = nn.LayerNorm(HIDDEN), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """A pipeline stage, or with one stage the whole model."""

    def __init__(self, stage: int, num_stages: int):
        super().__init__()
        self.first, self.last = stage == 0, stage == num_stages - 1
        if self.first:
            self.token, self.position = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(SEQ, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS // num_stages))
        if self.last:
            self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        self.tie()

    def tie(self) -> None:
        if self.first and self.last:
            self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = self.token(x) + self.position(torch.arange(SEQ))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) if self.last else x


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


class Peer:
    """A rank of the plain program."""

    def __init__(self, tp: int, pp: int, dp: int, batch: int):
        self.mesh = init_device_mesh("cpu", (pp, dp, tp), mesh_dim_names=("pp", "dp", "tp"))
        self.tp, self.pp, self.dp, self.own_batch = tp, pp, dp, batch // dp
        self.batch, self.dp_rank = batch, self.mesh.get_local_rank("dp")
        pp_rank = self.mesh.get_local_rank("pp")
        self.stage = GPT(pp_rank, pp)
        if tp > 1:
            apply_tensor_parallelism(self.stage, self.mesh["tp"])
        self.tied: Tensor | None = None
        if pp > 1:
            self._open_pipeline(pp_rank)
        self.model: nn.Module = DistributedDataParallel(self.stage) if dp > 1 and tp * pp == 1 else self.stage
        self.optimizer = torch.optim.AdamW(self.stage.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1,
                                           fused=True)

    def _open_pipeline(self, pp_rank: int) -> None:
        """Make the schedule, and the group of the two stages that hold the tied embedding."""
        # shapes are given: finding them out by a trial run hangs where stages hold DTensors (torch 2.13 on gloo)
        between = torch.empty(1, SEQ // self.tp, HIDDEN, requires_grad=True)
        takes = torch.empty(1, SEQ, dtype=torch.int64) if self.stage.first else between
        gives = torch.empty(1, SEQ, VOCAB // self.tp, requires_grad=True) if self.stage.last else between
        stage = PipelineStage(self.stage, pp_rank, self.pp, torch.device("cpu"), group=self.mesh.get_group("pp"),
                              input_args=(takes,), output_args=(gives,))
        self.schedule = Schedule1F1B(stage, self.own_batch, loss_fn=self.loss)
        ranks = self.mesh.mesh[[0, -1]].flatten(1).T.tolist()  # of every (dp, tp): its rank on the two end stages
        self.ends, _ = dist.new_subgroups_by_enumeration(ranks)
        if self.stage.first or self.stage.last:
            self.tied = self.stage.token.weight if self.stage.first else self.stage.head.weight
        if self.tied is not None:  # equal first values
            dist.broadcast(local(self.tied.data), group=self.ends, group_src=0)

    def step(self, number: int) -> float:
        """Take a training step; returns this rank's loss (0 where another stage has it)."""
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

    def pipelined(self, tokens: Tensor, targets: Tensor) -> float:
        losses: list[Tensor] = []
        if self.stage.first:
            self.schedule.step(tokens, return_outputs=False)
        elif self.stage.last:
            self.schedule.step(target=targets, losses=losses, return_outputs=False)
        else:
            self.schedule.step()
        return sum(float(local(x.detach())) for x in losses) / max(1, len(losses))

    def sum_over_dp(self) -> None:
        grads = [local(p.grad) for p in self.stage.parameters()]
        run = torch.cat([grad.flatten() for grad in grads]).div_(self.dp)
        dist.all_reduce(run, group=self.mesh.get_group("dp"))
        for grad, total in zip(grads, run.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(total.view_as(grad))

    def clip(self) -> None:
        """Clip by the norm over all stages; the tied embedding counts on the first stage."""
        if self.pp == 1:
            nn.utils.clip_grad_norm_(self.stage.parameters(), 1.0, foreach=True)
            return
        copy = self.tied if self.stage.last else None
        grads = [p.grad for p in self.stage.parameters() if p is not copy]
        norm = nn.utils.get_total_norm(grads, foreach=True)
        squared = (norm.full_tensor() if isinstance(norm, DTensor) else norm).square()
        dist.all_reduce(squared, group=self.mesh.get_group("pp"))
        factor = float((1.0 / (squared.sqrt() + 1e-6)).clamp(max=1.0))
        for parameter in self.stage.parameters():
            local(parameter.grad).mul_(factor)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def timed(step: Callable[[int], float], barrier: Callable[[], object], steps: int) -> tuple[float, list[float]]:
    """Seconds a step after the warm-up, and the losses of all steps."""
    losses = [step(number) for number in range(WARM_UP)]
    barrier()
    start = time.perf_counter()
    losses += [step(WARM_UP + number) for number in range(steps)]
    barrier()
    return (time.perf_counter() - start) / steps, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=int, nargs=3, metavar=("TP", "PP", "DP"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    rank, size = int(os.environ.get("PMI_RANK", "0")), int(os.environ.get("PMI_SIZE", "1"))
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}", rank=rank, world_size=size)
    torch.manual_seed(1)
    peer = Peer(*args.sizes, args.batch)
    seconds, losses = timed(peer.step, dist.barrier, args.steps)
    total = torch.tensor(losses)
    dist.all_reduce(total)
    total /= args.sizes[0] * args.sizes[2]  # ranks that know a loss
    if rank == 0:
        print(json.dumps({"seconds_per_step": seconds, "losses": total.tolist()}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
