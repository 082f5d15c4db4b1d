"""Two kinds of GPUs in one job: replicas of each kind take microbatches by their speed.

Tensor and pipeline groups stay within one kind, because a group is as slow as its slowest member; what is shared out
is the batch. Source of the idea: Jia et al. 2022, Whale, USENIX ATC (hardware-aware load balance).
"""

from __future__ import annotations

from dataclasses import dataclass

from hpcpar.config.job import Job
from hpcpar.config.load import override
from hpcpar.errors import UserError
from hpcpar.planner.hardware import Machine, load_machine
from hpcpar.planner.step import Pricing
from hpcpar.units import format_bytes, format_seconds


@dataclass(frozen=True)
class Share:
    """What one kind of GPU does."""

    machine: Machine
    replicas: int
    microbatches: int  # of each replica
    step_s: float
    memory_bytes: float
    host_fits: bool


@dataclass(frozen=True)
class Shared:
    """A batch shared out over two kinds, and what an even share would take."""

    shares: tuple[Share, Share]
    step_s: float
    even_step_s: float


def share_out(job: Job, kinds: tuple[tuple[str, int], tuple[str, int]]) -> Shared:
    """Share a resolved job's batch over (kind, number of GPUs) twice; tp, pp and microbatch are the job's.

    Raises UserError where a kind cannot hold whole replicas, or its memory does not suffice.
    """
    size = job.layout.tp * job.layout.pp * job.layout.cp
    machines = [load_machine(name) for name, _ in kinds]
    replicas = []
    for name, number in kinds:
        if number % size or number == 0:
            raise UserError("--with", f"{number} {name} are no whole replicas of tp x pp = {size}",
                            f"nearest: {max(1, number // size) * size}")
        replicas.append(number // size)
    total = job.train.global_batch // job.train.microbatch
    if total < sum(replicas):
        raise UserError("train.global_batch", f"has {total} microbatches for {sum(replicas)} replicas",
                        f"write {sum(replicas) * job.train.microbatch} or more")

    def share(index: int, num: int) -> Share:
        batch = num * replicas[index] * job.train.microbatch
        layout = {"dp": replicas[index], "zero": job.layout.zero_stage}
        mine = override(job, layout=layout, train={"global_batch": batch})
        pricing = Pricing(mine, machines[index])
        return Share(pricing.machine, replicas[index], num, pricing.step(quick=True).total,
                     max(m.total for m in pricing.memory()), pricing.host_fits)

    best, even = None, None
    for first in range(1, total // replicas[0] + 1):
        rest = total - first * replicas[0]
        if rest < replicas[1]:
            break
        second = -(-rest // replicas[1])
        pair = share(0, first), share(1, second)
        length = max(s.step_s for s in pair)
        if best is None or length < best[0]:
            best = length, pair
        if even is None and first >= second:
            even = length
    assert best is not None
    for one in best[1]:
        if one.memory_bytes > one.machine.chip.usable_bytes:
            raise UserError("--with", f"a rank needs {format_bytes(one.memory_bytes)}, a {one.machine.name} has "
                            f"{format_bytes(one.machine.chip.usable_bytes)}", "raise tp or pp, or recompute more")
        if not one.host_fits:
            raise UserError("layout.recompute", f"a {one.machine.name}'s share of the host's memory does not hold what "
                            "is to wait there", 'write "full"')
    return Shared(best[1], best[0], even or best[0])


def describe_shared(shared: Shared) -> str:
    """Tell how the batch is shared out, and what it gains."""
    lines = [f"{s.replicas} replicas on {s.machine.name}: {s.microbatches} microbatches each, "
             f"{format_seconds(s.step_s)}, {format_bytes(s.memory_bytes)} a rank" for s in shared.shares]
    gain = shared.even_step_s / shared.step_s
    return "\n".join([*lines, f"step {format_seconds(shared.step_s)}; evenly shared "
                      f"{format_seconds(shared.even_step_s)}: {gain:.2f} times quicker"])
