"""Ranks that share one device's compute: a CPU with fewer cores than ranks.

Prices are those of a rank that has a core (or several, as threads) for itself. Then the step is played with the cores
shared: whoever has work gets a part of them, later stages a larger one (`layout.precedence`), who waits for a message
leaves its part to the others. So a wait costs little, a bubble is filled by other ranks, and nothing is hidden: an
exchange is a core's work too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from hpcpar.errors import HpcparError
from hpcpar.layout.precedence import PER_LEVEL, nice_levels
from hpcpar.layout.schedule import Schedule
from hpcpar.planner.hardware import Machine
from hpcpar.planner.timeline import INPUT_SHARE, numbered


@dataclass(frozen=True)
class Node:
    """The ranks of one node, and what they share; `cores` 0: every rank has a device of its own."""

    ranks: int
    cores: int

    @property
    def threads(self) -> int:
        """Cores that a rank works with at once."""
        return max(1, self.cores // self.ranks)

    @property
    def crowd(self) -> float:
        """Ranks for each of them that can work at a time: how much longer work takes while all are busy."""
        return max(1.0, self.ranks * self.threads / self.cores) if self.cores else 1.0


@lru_cache(maxsize=64)
def as_rank_sees(machine: Machine, node: Node) -> Machine:
    """Return the machine as one rank sees it that has its cores for itself, with its part of the node's memory."""
    if not node.cores:
        return machine
    chip, peak, threads = machine.chip, dataclasses.asdict(machine.peak_tflops), node.threads
    return dataclasses.replace(
        machine,
        chip=dataclasses.replace(chip, memory_gib=chip.memory_gib / node.ranks, watts=chip.watts / node.ranks,
                                 reserved_gib=chip.reserved_gib / node.ranks, gb_per_s=chip.gb_per_s * threads),
        peak_tflops=type(machine.peak_tflops)(**{name: rate * threads for name, rate in peak.items()}))


def shared_length_s(schedule: Schedule, forward_s: Sequence[float], backward_s: Sequence[float], stage_ranks: int,
                    node: Node) -> float:
    """Return the length of a schedule on nodes whose cores are shared; times are a chunk's with a core for itself.

    `stage_ranks` ranks (tp x dp) are alike and play a pipeline rank's actions together. A node's ranks that work at
    the moment share its cores, by their nice levels. Cost: O(actions x pipeline ranks).
    """
    num, last, orders = schedule.num_microbatches, schedule.num_chunks - 1, numbered(schedule)
    forward, backward = ([False] * (num * (last + 1)) for _ in range(2))  # by chunk x microbatch: whether it is done
    position, left = [0] * len(orders), [0.0] * len(orders)
    width, home = min(stage_ranks, node.ranks), [rank * stage_ranks // node.ranks for rank in range(len(orders))]
    places = node.cores / node.threads  # ranks that a node lets work at full speed
    weights = [PER_LEVEL ** -level for level in nice_levels(schedule.chunk_ranks)]
    shares = {0: (1.0, 0.0), 1: (0.0, 1.0), 2: (0.0, INPUT_SHARE), 3: (0.0, 1 - INPUT_SHARE)}

    def ready(kind: int, chunk: int, index: int) -> bool:
        if kind == 0:
            return chunk == 0 or forward[index - num]
        return kind == 3 or (forward[index] if chunk == last else backward[index + num])

    now = 0.0
    while True:
        for rank, order in enumerate(orders):
            if not left[rank] and position[rank] < len(order) and ready(*order[position[rank]]):
                kind, chunk, _ = order[position[rank]]
                left[rank] = max(1e-12, shares[kind][0] * forward_s[chunk] + shares[kind][1] * backward_s[chunk])
        working = [rank for rank, rest in enumerate(left) if rest]
        if not working:
            break
        rates = [0.0] * len(working)
        for host in {home[rank] for rank in working}:
            here = [at for at, rank in enumerate(working) if home[rank] == host]
            for at, rate in zip(here, parts([weights[working[at]] for at in here], places / width), strict=True):
                rates[at] = rate
        step = min(left[rank] / rate for rank, rate in zip(working, rates, strict=True))
        now += step
        for rank, rate in zip(working, rates, strict=True):
            left[rank] -= step * rate
            if left[rank] <= 1e-9 * step:
                left[rank] = 0.0
                kind, _, index = orders[rank][position[rank]]
                (forward if kind == 0 else backward)[index] |= kind != 3
                position[rank] += 1
    if any(at < len(order) for at, order in zip(position, orders, strict=True)):
        raise HpcparError(f"schedule deadlocks: ranks stand at {position}")
    return now


def parts(weights: Sequence[float], places: float) -> list[float]:
    """Divide `places` among ranks by weight; none takes more than one, and what it leaves goes to the others."""
    taken = [0.0] * len(weights)
    for at in sorted(range(len(weights)), key=lambda at: -weights[at]):
        rest = sum(weights[other] for other in range(len(weights)) if not taken[other])
        taken[at] = min(1.0, places * weights[at] / rest)
        places -= taken[at]
    return taken
