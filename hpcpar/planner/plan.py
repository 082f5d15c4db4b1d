"""A job foretold: parameters, FLOPs, memory, time, days, money. What `hpcpar plan` prints and submission checks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hpcpar.config.job import Job
from hpcpar.layout.layout import Layout
from hpcpar.planner import flops
from hpcpar.planner.hardware import Machine, load_machine
from hpcpar.planner.memory import Memory
from hpcpar.planner.money import Run, whole_run
from hpcpar.planner.params import total_parameters
from hpcpar.planner.practice import Practice
from hpcpar.planner.step import Pricing, StepTime


@dataclass(frozen=True)
class Plan:
    """What is foretold of one resolved job on one machine."""

    pricing: Pricing
    time: StepTime
    memory: list[Memory]  # of every pipeline rank; its tp and dp ranks hold equally much

    @property
    def job(self) -> Job:
        """The job."""
        return self.pricing.job

    @property
    def machine(self) -> Machine:
        """The machine, as one of its ranks sees it."""
        return self.pricing.machine

    @cached_property
    def params(self) -> int:
        """Parameters of the model, each once."""
        return total_parameters(self.job.model)

    @property
    def model_flops(self) -> float:
        """FLOPs of a step without recomputation."""
        return flops.model_flops(self.job.model, self.job.train.global_batch)

    @property
    def hardware_flops(self) -> float:
        """FLOPs of a step, recomputation counted."""
        practice = self.pricing.practice
        again = flops.recomputed_flops(self.job.model, self.job.train.global_batch, self.job.layout.recompute,
                                       practice.recomputes_projections)
        return self.model_flops + again

    @property
    def fullest(self) -> int:
        """The pipeline rank that holds most."""
        return max(range(len(self.memory)), key=lambda r: self.memory[r].total)

    @property
    def spare_bytes(self) -> float:
        """What the fullest rank leaves free; negative: it does not fit."""
        return self.machine.chip.usable_bytes - self.memory[self.fullest].total

    @property
    def fits(self) -> bool:
        """Whether every rank's memory suffices, and its share of the host's."""
        return self.spare_bytes >= 0 and self.pricing.host_fits

    @property
    def mfu(self) -> float:
        """Model FLOPs over the dense peak."""
        return self._share(self.model_flops)

    @property
    def hfu(self) -> float:
        """FLOPs over the dense peak, recomputation counted."""
        return self._share(self.hardware_flops)

    def _share(self, step_flops: float) -> float:
        return step_flops / (self.time.total * self.job.world_size * self.rank_peak_flops)

    @property
    def rank_peak_flops(self) -> float:
        """The dense peak that a rank can count on, in FLOP/s: its device's, or its part of shared cores."""
        return self.machine.peak_flops(self.job.train.precision) / self.pricing.node.crowd

    @cached_property
    def run(self) -> Run:
        """The whole run."""
        saved = max(m.master + m.moments or m.states for m in self.memory)
        return whole_run(self.job, self.time.total, saved, self.machine.chip.watts)

    @property
    def steps(self) -> float:
        """Full steps' worth of samples in the run."""
        return self.run.tokens / (self.job.train.global_batch * self.job.model.seq)

    def pf_days(self) -> tuple[float, float]:
        """Return (6PT, and 8PT where the forward is recomputed in full): the accountings that publications use."""
        full = self.job.layout.recompute == "full"
        return (flops.pf_days(flops.train_flops(self.params, self.run.tokens)),
                flops.pf_days(flops.train_flops(self.params, self.run.tokens, recompute=full)))

    def as_json(self) -> dict[str, Any]:
        """Return the numbers by the names that scripts rely on; seconds, bytes, FLOP."""
        tokens = self.job.train.global_batch * self.job.model.seq
        run = self.run
        return {
            "params": self.params, "model_flops": self.model_flops, "hardware_flops": self.hardware_flops,
            "step_s": self.time.total, "tokens_per_s_per_gpu": tokens / self.time.total / self.job.world_size,
            "tflops_per_gpu": self.model_flops / self.time.total / self.job.world_size / 1e12,
            "mfu": self.mfu, "hfu": self.hfu, "bubble": self.time.bubble,
            "memory_bytes": self.memory[self.fullest].total, "memory_by_stage": [m.total for m in self.memory],
            "fits": self.fits, "pf_days_model": self.pf_days()[0], "pf_days_hardware": self.pf_days()[1],
            "days": run.days,
            "gpu_hours": run.days * 24 * self.job.world_size, "parts": self.time.parts,
        }


def make_plan(job: Job, machine: Machine | None = None, practice: Practice | None = None,
              exact: bool = True) -> Plan:
    """Foretell a resolved job; `exact` takes states from the buckets themselves, padding included.

    Cost: about a tenth of a second for hundreds of stages.
    """
    pricing = Pricing(job, machine or load_machine(job.machine.gpu), practice)
    numel = bucket_lengths(Layout(job)) if exact else None
    return Plan(pricing, pricing.step(), pricing.memory(numel))


def bucket_lengths(layout: Layout) -> list[int]:
    """Return how many elements the buckets of each pipeline rank hold; ranks with like chunks are counted once."""
    last = len(layout.chunks) - 1
    known: dict[tuple[int, bool, bool], int] = {}
    lengths = []
    for rank, layers in enumerate(layout.stages):
        mine = layout.chunks_of(rank)
        key = len(layers), 0 in mine, last in mine
        if key not in known:
            known[key] = sum(bucket.numel for bucket in layout.buckets(rank, 0))
        lengths.append(known[key])
    return lengths
