"""layout.recompute = "auto": the quickest of the others that the planner says fits."""

from __future__ import annotations

from hpcpar.config.job import Job
from hpcpar.config.load import override
from hpcpar.planner.hardware import Machine
from hpcpar.planner.plan import make_plan
from hpcpar.planner.search import SPARE


def choose_recompute(job: Job, machine: Machine | None = None) -> Job:
    """Return a resolved job with a value in place of "auto"; any other job as it is.

    As in a search, a part of the memory is to stay free. Where nothing fits it is "full": a plan and a submission say
    that it does not fit. All ranks choose alike, from the job and the machine's TOML alone. Raises UserError where
    `machine.gpu` is unknown. Cost: three plans, a tenth of a second each.
    """
    if job.layout.recompute != "auto":
        return job
    plans = [make_plan(override(job, layout={"recompute": mode}), machine) for mode in ("none", "selective", "full")]
    fitting = [plan for plan in plans if plan.spare_bytes >= SPARE * plan.machine.chip.usable_bytes]
    return min(fitting or plans[-1:], key=lambda plan: plan.time.total).job
