"""What the planner foretells of a run, printed beside what is measured: when it starts, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from hpcpar.config.job import Job
from hpcpar.config.load import override
from hpcpar.planner.plan import make_plan
from hpcpar.units import format_bytes, format_seconds


@dataclass(frozen=True)
class Foretold:
    """A step's seconds and the fullest rank's bytes, for the machine that the job names."""

    machine: str
    step_s: float
    memory_bytes: float

    def __str__(self) -> str:
        hint = " (ranks with a core each; hpcpar calibrate measures this machine)" if self.machine == "cpu" else ""
        return (f"foretold for {self.machine}: {format_seconds(self.step_s)} a step, "
                f"{format_bytes(self.memory_bytes)} on the fullest rank{hint}")

    def beside(self, step_s: Sequence[float], memory_bytes: Sequence[int]) -> str:
        """Compare with the seconds of steps that took the whole batch, and the bytes that each rank took."""
        step, memory = median(step_s), max(memory_bytes)
        return (f"a step: {format_seconds(step)} measured, {format_seconds(self.step_s)} foretold "
                f"({self.step_s / step - 1:+.0%}); the fullest rank: {format_bytes(memory)} measured, "
                f"{format_bytes(self.memory_bytes)} foretold; for {self.machine}")


def foretell(job: Job, ranks_per_node: int) -> Foretold:
    """Foretell a resolved job on nodes that have so many of its ranks.

    Raises UserError where `machine.gpu` is unknown. Cost: a tenth of a second.
    """
    plan = make_plan(override(job, machine={"gpus_per_node": ranks_per_node}))
    return Foretold(job.machine.gpu, plan.time.total, plan.memory[plan.fullest].total)
