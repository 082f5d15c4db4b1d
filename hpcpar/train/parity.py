"""Parity: a job on its layout against the same job as one plain process, tensor by tensor, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hpcpar.comm.bootstrap import World
from hpcpar.comm.groups import open_groups
from hpcpar.config.job import Job
from hpcpar.config.ramp import batch_size
from hpcpar.layout.layout import Layout
from hpcpar.layout.parameters import parameter_table
from hpcpar.nn.dropout import draw_for
from hpcpar.nn.init import initial_values
from hpcpar.nn.transformer import Transformer
from hpcpar.optim.schedules import learning_rate
from hpcpar.parallel.buckets import FlatBucket
from hpcpar.parallel.build import build, initialise
from hpcpar.train.state import FIRST_LOSS_SCALE, Progress
from hpcpar.train.step import Tokens, Trainee, train_step


@dataclass
class Snapshot:
    """What one step of the oracle left: whole tensors by name."""

    loss: float
    grad_norm: float
    grads: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]


def oracle(job: Job, tokens: Tokens, steps: int, device: torch.device) -> Iterator[Snapshot]:
    """Train the job's model as one process would write it: no bucket, no shard, no schedule, torch's own AdamW.

    The truth about bf16 and fp16 is fp32: weights kept at 8 or 11 bits would be a worse model, not a reference.
    """
    model, optim = job.model, job.optim
    dtype = torch.float64 if job.train.precision == "fp64" else torch.float32
    network = Transformer(model, range(model.layers), first=True, last=True).to(device, dtype)
    with torch.no_grad():
        for p in parameter_table(model):
            network.get_parameter(p.name).copy_(initial_values(p, p.box(1, 0), job.train.seed, device))
    named = dict(network.named_parameters())
    matrices = [p for p in named.values() if p.dim() > 1]
    vectors = [p for p in named.values() if p.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=optim.betas, eps=optim.eps, foreach=False,
    )
    samples = 0
    for step in range(steps):
        batch, total = batch_size(job, samples), 0.0
        adamw.zero_grad()
        for first in range(samples, samples + batch, job.train.microbatch):
            numbers = np.arange(first, first + job.train.microbatch)
            rows = torch.from_numpy(tokens(numbers)).to(device)
            draw = draw_for(torch.from_numpy(numbers).to(device), range(model.seq), model.seq, job.train.seed, step)
            loss = network(rows[:, :-1], rows[:, 1:], draw) * (job.train.microbatch / batch)
            loss.backward()
            total += loss.item()
        grads = {name: _numpy(p.grad) for name, p in named.items()}
        norm = torch.nn.utils.clip_grad_norm_(named.values(), optim.clip if optim.clip else float("inf")).item()
        for group in adamw.param_groups:
            group["lr"] = learning_rate(optim, step)
        adamw.step()
        samples += batch
        yield Snapshot(total, norm, grads, {name: _numpy(p) for name, p in named.items()})


@dataclass
class Parity:
    """The largest differences found on any rank; `first` names the first tensor beyond the tolerance."""

    loss: float = 0.0
    grad_norm: float = 0.0
    grads: float = 0.0
    weights: float = 0.0
    first: str = ""
    losses: list[float] = field(default_factory=list)

    def tensor(self, kind: str, name: str, step: int, got: Tensor, want: np.ndarray, tolerance: float) -> None:
        """Compare a piece of a tensor with the oracle's."""
        difference = float(np.abs(_numpy(got).reshape(want.shape) - want).max(initial=0))
        difference = difference if np.isfinite(difference) else float("inf")
        setattr(self, kind, max(getattr(self, kind), difference))
        if difference > tolerance and not self.first:
            self.first = f"{kind} of {name} at step {step}: differs by {difference:.3g}"

    def scalar(self, kind: str, step: int, got: float, want: float, tolerance: float) -> None:
        """Compare a number, relative to its size."""
        difference = abs(got - want) / max(1.0, abs(want))
        setattr(self, kind, max(getattr(self, kind), difference))
        if not difference <= tolerance and not self.first:
            self.first = f"{kind} at step {step}: {got!r}, one process has {want!r}"


def compare(job: Job, world: World, tokens: Tokens, steps: int, tolerance: float) -> Parity:
    """Run a resolved job on its layout and as one process (on rank 0), and return the differences.

    Every rank of the world must call; those beyond the layout only take part in the agreement. In fp64 gradients and
    weights are compared too; in lower precisions loss and gradient norm only, as the order of sums shows there.
    """
    layout, found, exact = Layout(job), Parity(), job.train.precision == "fp64"
    mine = world.rank < layout.mesh.size
    truth = oracle(job, tokens, steps, world.device) if world.rank == 0 else iter(())
    groups = open_groups(layout.mesh, world.rank) if mine else None
    progress = Progress(loss_scale=FIRST_LOSS_SCALE if job.train.precision == "fp16" else 1.0)
    trainee = None
    if groups is not None:
        pipeline, optimizer = build(layout, groups, world.device)
        initialise(optimizer, job.train.seed)
        trainee = Trainee(layout, groups, pipeline, optimizer, world.device)
    for step in range(steps):
        want: Snapshot = world.control.broadcast(next(truth, None))
        if trainee is None:
            continue
        result = train_step(trainee, progress, tokens)
        found.losses.append(result.loss)
        found.scalar("loss", step, result.loss, want.loss, tolerance)
        found.scalar("grad_norm", step, result.grad_norm, want.grad_norm, tolerance)
        if exact:
            clip = min(1.0, job.optim.clip / (want.grad_norm + 1e-6)) if job.optim.clip else 1.0
            _compare_tensors(trainee, want, clip, step, tolerance, found)
    if groups is not None:
        groups.close()
    return _worst(world.control.all_gather(found))


def _compare_tensors(trainee: Trainee, want: Snapshot, clip: float, step: int, tolerance: float,
                     found: Parity) -> None:
    """Compare the owned gradients (each element is owned once) and all weights that this rank computes with."""
    optimizer = trainee.optimizer
    for piece in optimizer.pieces:
        name, flat = piece.parameter.name, optimizer.buckets[piece.bucket]
        at = slice(piece.start, piece.start + piece.box.numel)
        found.tensor("grads", name, step, flat.own_grads[at], want.grads[name][piece.box.slices()] * clip, tolerance)
        found.tensor("weights", name, step, flat.shard["weight"][at], want.weights[name][piece.box.slices()],
                     tolerance)
    for flat in optimizer.buckets:
        _compare_gathered(flat, want, step, tolerance, found)


def _compare_gathered(flat: FlatBucket, want: Snapshot, step: int, tolerance: float, found: Parity) -> None:
    whole = flat.whole_weights()
    for slot in flat.bucket.slots:
        here = whole[slot.start:slot.start + slot.box.numel]
        name = slot.parameter.name
        found.tensor("weights", name, step, here, want.weights[name][slot.box.slices()], tolerance)


def _worst(found: list[Parity]) -> Parity:
    """Join all ranks' findings: the largest differences and the earliest first tensor."""
    worst = Parity(losses=found[0].losses)
    for kind in ("loss", "grad_norm", "grads", "weights"):
        setattr(worst, kind, max(getattr(p, kind) for p in found))
    worst.first = next((p.first for p in found if p.first), "")
    return worst


def _numpy(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    array: np.ndarray = tensor.detach().to("cpu", copy=True).numpy()
    return array
