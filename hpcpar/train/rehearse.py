"""Plays one rank of a whole job on this machine, with communications faked: memory, arithmetic and time of a step.

On shapes only no tensor is made: torch's fake tensors carry shapes and dtypes through the very code that trains, and
every storage that would have been allocated is counted.
"""

from __future__ import annotations

import time
import weakref
from bisect import bisect_left
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from hpcpar.comm.groups import open_groups
from hpcpar.comm.silent_backend import silent_world
from hpcpar.layout.layout import Layout
from hpcpar.layout.mesh import Coordinates
from hpcpar.layout.schedule import in_flight
from hpcpar.parallel.build import build
from hpcpar.parallel.zero import ShardedOptimizer
from hpcpar.planner.plan import make_plan
from hpcpar.train.state import Progress
from hpcpar.train.step import Trainee, compute_gradients
from hpcpar.units import format_bytes

STATES = ("weights", "gradients", "master", "moments")


@dataclass(frozen=True)
class Rehearsal:
    """What one step of one rank took.

    `memory_bytes` is the peak by category: the states; "activations", what lay between two actions when the peak
    came; "working", what the action itself had made by then. `compute_s` is of
    the microbatches played, `flops` of one.
    """

    at: Coordinates
    num_microbatches: int  # played: the fewest that fill this stage as a whole step does, and one more
    memory_bytes: dict[str, int]
    flops: int
    compute_s: float = 0.0  # 0 on shapes only
    update_s: float = 0.0

    @property
    def peak_bytes(self) -> int:
        """The most that was held at once."""
        return sum(self.memory_bytes.values())


def steady_microbatches(layout: Layout, pp_rank: int) -> int:
    """Return how many microbatches hold as much in flight on a stage as a whole step does, and one more."""
    whole = layout.num_microbatches
    unit = layout.mesh.pp_size if layout.job.layout.chunks > 1 else 1  # interleaving wants whole rounds

    def held(units: int) -> int:
        return in_flight(layout.schedule(units * unit).orders[pp_rank])

    fewest = bisect_left(range(1, whole // unit + 1), held(whole // unit), key=held) + 1
    return min((fewest + 1) * unit, whole)


def rehearse(layout: Layout, global_rank: int, device: torch.device, real: bool) -> Rehearsal:
    """Play a rank's step: with tensors on `device`, or (not `real`) with their shapes only.

    Values mean nothing, since nobody sends any: what is received is whatever lay in memory. With tensors the step is
    played twice, first counted, then timed. Raises RuntimeError of torch where the tensors do not fit.
    """
    at = layout.mesh.coordinates(global_rank)
    num_microbatches = steady_microbatches(layout, at.pp_rank)
    ledger = Ledger()
    flops = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with silent_world(layout.mesh.size, global_rank), ExitStack() as modes:
        modes.enter_context(nullcontext() if real else FakeTensorMode())
        with ledger:
            trainee = _make(layout, global_rank, device, ledger)
        with ledger:
            _play(trainee, num_microbatches)
        with flops:  # apart: it keeps recomputed tensors alive
            _play(trainee, 1)
        compute_s, update_s = _play(trainee, num_microbatches) if real else (0.0, 0.0)
    states = state_bytes(trainee.optimizer)
    memory = {**states, "activations": ledger.peak_before - sum(states.values()),
              "working": ledger.peak - ledger.peak_before}
    return Rehearsal(at, num_microbatches, memory, flops.get_total_flops(), compute_s, update_s)


def state_bytes(optimizer: ShardedOptimizer) -> dict[str, int]:
    """Return the bytes of the storages that a rank keeps between steps, by category; shared ones count once."""
    found: dict[str, int] = dict.fromkeys(STATES, 0)
    seen: set[int] = set()
    for flat in optimizer.buckets:
        for category, held in flat.kept_tensors().items():
            for storage in (tensor.untyped_storage() for tensor in held):
                found[category] += storage.nbytes() if id(storage) not in seen else 0
                seen.add(id(storage))
    return found


class Ledger(TorchDispatchMode):
    """Counts the bytes of living storages, real or fake, from their first appearance to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.before = self.peak_before = 0  # held when the present action began, and the one in which the peak came
        self._known: dict[int, Any] = {}

    def begin(self, action: str) -> None:
        """Say that an action begins."""
        self.before = self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":  # the network is laid out there first
                self._enter(leaf.untyped_storage())
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        if key in self._known:
            return

        def leave(_: object) -> None:
            self.held -= num_bytes
            del self._known[key]

        self._known[key] = weakref.ref(storage, leave)
        self.held += num_bytes
        if self.held > self.peak:
            self.peak, self.peak_before = self.held, self.before


def _sdpa_forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop(query, key, value))


def _sdpa_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop(grad, query, key, value))


# torch counts its attention kernels of GPUs only
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
}


def _make(layout: Layout, global_rank: int, device: torch.device, ledger: Ledger) -> Trainee:
    groups = open_groups(layout.mesh, global_rank)
    pipeline, optimizer = build(layout, groups, device, ledger.begin)
    return Trainee(layout, groups, pipeline, optimizer, device)


def _play(trainee: Trainee, num_microbatches: int) -> tuple[float, float]:
    """Play a step: gradients and their sums, norm and update. Returns the seconds of both halves."""
    layout = trainee.layout
    model, size = layout.job.model, layout.job.train.microbatch
    rows = np.random.default_rng(0).integers(0, model.vocab, (size, model.seq + 1))
    samples = range(num_microbatches * layout.mesh.dp_size * size)
    start = _now(trainee.device)
    compute_gradients(trainee, Progress(), lambda numbers: rows, samples, 1.0)
    middle = _now(trainee.device)
    trainee.pipeline.note("update")
    trainee.optimizer.norm_squared()
    trainee.optimizer.update(1e-4, 0, 1.0)
    return middle - start, _now(trainee.device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def describe(layout: Layout, played: Rehearsal) -> str:
    """Tell a rehearsal in words, beside what the planner foretells of that rank on the job's machine."""
    at, job, memory = played.at, layout.job, played.memory_bytes
    plan = make_plan(job)
    foretold, on_host = plan.memory[at.pp_rank], plan.pricing.rank_host_bytes(at.pp_rank)
    rows = {**{state: (memory[state], getattr(foretold, state)) for state in STATES},
            "activations": (memory["activations"], foretold.activations + on_host),
            "working": (memory["working"], foretold.buffers + foretold.logits),
            "peak": (played.peak_bytes, foretold.total - foretold.fragmentation + on_host)}
    lines = [
        f"rank {layout.mesh.rank(at)} of {layout.mesh.size} ({at}): {len(layout.stages[at.pp_rank])} layers of "
        f"{job.model.layers}, {played.num_microbatches} of {layout.num_microbatches} microbatches played, "
        f"{'with tensors' if played.compute_s else 'on shapes only'}",
        f"{'':<14}{'rehearsed':>12}{'foretold':>12}" + ("  (with what waits on the host)" if on_host else ""),
        *(f"{name:<14}{format_bytes(seen):>12}{format_bytes(said):>12}" for name, (seen, said) in rows.items()),
        f"arithmetic    {played.flops / 1e12:.3f} TFLOP a microbatch, "
        f"{played.flops * layout.num_microbatches / 1e12:.1f} a step",
    ]
    if played.compute_s:
        mine = [plan.pricing.chunks[chunk] for chunk in layout.chunks_of(at.pp_rank)]
        rate = played.flops * played.num_microbatches / played.compute_s / 1e12
        times = {"a microbatch": (played.compute_s / played.num_microbatches,
                                  sum(chunk.forward.work + chunk.backward.work for chunk in mine)),
                 "update": (played.update_s, plan.pricing.update_s(at.pp_rank))}
        lines += [f"{name:<14}{1e3 * seen:>9.2f} ms{1e3 * said:>9.2f} ms" for name, (seen, said) in times.items()]
        lines.append(f"computing at  {rate:.2f} TFLOP/s; no message, no bubble")
    return "\n".join(lines)
