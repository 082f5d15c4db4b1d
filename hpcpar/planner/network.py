"""How long an exchange takes: alpha-beta by link class, rings over a group that may span nodes."""

from __future__ import annotations

from dataclasses import dataclass

from hpcpar.planner.hardware import Machine


@dataclass(frozen=True)
class Ring:
    """A group of ranks as a ring sees it: `size` ranks, `per_node` of them neighbours on each node."""

    size: int
    per_node: int

    @property
    def num_nodes(self) -> int:
        """Nodes that the ring passes through."""
        return -(-self.size // self.per_node)


def ring(machine: Machine, size: int, stride: int) -> Ring:
    """Describe a group whose members are `stride` ranks apart (tp fastest): how many fall on one node."""
    return Ring(size, max(1, min(size, machine.inside.devices // stride)))


def gather_s(machine: Machine, group: Ring, num_bytes: float) -> float:
    """Return the seconds of an all-gather or reduce-scatter of `num_bytes` in all: (n-1)(alpha + N/(n beta)).

    A ring across nodes is as fast as the adapters of its members on one node together, and no faster than inside.
    """
    if group.size <= 1:
        return 0.0
    inside, across = machine.inside, machine.across
    crossings = group.num_nodes if group.num_nodes > 1 else 0
    latency = 1e-6 * ((group.size - 1 - crossings) * inside.latency_us + crossings * across.latency_us)
    rate = inside.bytes_per_s
    if crossings:
        rate = min(rate, across.bytes_per_s * group.per_node) if group.per_node > 1 else across.bytes_per_s
    return max(latency, 0.0) + (group.size - 1) / group.size * num_bytes / rate


def reduce_s(machine: Machine, group: Ring, num_bytes: float) -> float:
    """Return the seconds of an all-reduce: a reduce-scatter and an all-gather. Source: 2(n-1)(alpha + N/(n beta))."""
    return 2 * gather_s(machine, group, num_bytes)


def message_s(machine: Machine, num_bytes: float, inside: bool) -> float:
    """Return the seconds of a message between two ranks."""
    link = machine.inside if inside else machine.across
    return link.latency_us * 1e-6 + num_bytes / link.bytes_per_s
