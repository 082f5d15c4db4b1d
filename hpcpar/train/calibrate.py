"""Measures this machine for the planner: products, attention, memory, and exchanges where there are several ranks.

All ranks measure at once, as they train at once: what they share (cores, memory, links) is measured shared. GPUs
are measured by large work alone: small work is bound by the host, which in training runs ahead.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from hpcpar.comm.bootstrap import World
from hpcpar.comm.collectives import gather_flat, reduce_scatter_flat
from hpcpar.comm.groups import Group, open_groups
from hpcpar.errors import UserError
from hpcpar.layout.mesh import Mesh
from hpcpar.planner.calibration import Core, Exchange, Measured, Moved, Product

WINDOW_S = 0.5  # of every measurement
WEIGHTS_BYTES = 32 * 2**20  # of weights that take turns: in training, they have left the cache when their turn comes
EXCHANGES = (16 * 2**10, 128 * 2**10, 2**20, 4 * 2**20)  # bytes
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# tokens x out x in, from a small model's share of tp 8 to a large model's layer: of cores, of GPUs
SHAPES = ((128, 64, 256), (512, 64, 512), (512, 256, 64), (512, 512, 512), (256, 1024, 256), (256, 256, 1024),
          (64, 64, 512), (512, 512, 128), (1024, 1024, 1024), (2048, 512, 2048), (512, 2048, 512), (304, 1216, 512))
LARGE = ((4096, 4096, 4096), (8192, 8192, 8192), (8192, 2048, 8192), (8192, 8192, 2048), (2048, 16384, 4096),
         (16384, 2048, 2048), (4096, 1024, 4096), (2048, 8192, 16384))
# batch x seq x heads x channels of attention
CORES = ((4, 128, 2, 64), (2, 256, 4, 64))
LARGE_CORES = ((8, 2048, 16, 128), (2, 4096, 16, 128), (1, 8192, 32, 128))
# tokens x hidden between products
MOVED = ((16, 64), (128, 256), (512, 256), (512, 512))
LARGE_MOVED = ((8192, 2048), (16384, 2048), (8192, 4096))


@dataclass(frozen=True)
class Node:
    """This rank's node: how many ranks it has, and how many nodes there are."""

    ranks: int
    count: int


class Stopwatch:
    """Times work that all ranks do at once; what it returns is the mean of a rank that has its cores for itself."""

    def __init__(self, world: World, node: Node):
        self._world, self._device = world, world.device
        self.cores = 0 if world.device.type == "cuda" else len(os.sched_getaffinity(0))
        self.threads = torch.get_num_threads() if self.cores else 1
        self.part = min(1.0, self.cores / node.ranks) if self.cores else 1.0  # of a core, that a rank had meanwhile

    def call_s(self, call: Callable[[], object]) -> float:
        """Return the seconds of one call; ranks make as many as they can in a window."""
        batch = 20 if self._device.type == "cuda" else 1
        call()
        self._world.control.barrier()
        spent: list[float] = []
        before, end = self._now(), self._now() + WINDOW_S
        while before < end or len(spent) < 2:
            for _ in range(batch):
                call()
            after = self._now()
            spent.append((after - before) / batch)
            before = after
        everyones: list[tuple[int, float, float]] = self._world.control.all_gather(
            (len(spent), sum(spent), median(spent)))
        if self.part == 1:  # no rank shares its cores: what took longer was disturbed from outside
            return sum(middle for _, _, middle in everyones) / len(everyones)
        return self.part * sum(seconds for _, seconds, _ in everyones) / sum(calls for calls, _, _ in everyones)

    def together_s(self, call: Callable[[], object]) -> float:
        """Return the seconds of one call that all ranks make equally often, because it holds exchanges."""
        call()
        trial = self._repeated_s(call, 3)
        times = max(3, int(WINDOW_S / max(trial, 1e-6)))
        times = self._world.control.broadcast(times)
        return self.part * self._repeated_s(call, times)

    def _repeated_s(self, call: Callable[[], object], times: int) -> float:
        self._world.control.barrier()
        start = self._now()
        for _ in range(times):
            call()
        everyones: list[float] = self._world.control.all_gather(self._now() - start)
        return sum(everyones) / times / self._world.size

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def measure(world: World, say: Callable[[str], None]) -> Measured:
    """Measure; every rank must call. `say` is given a line as each part begins. Cost: about a minute.

    Raises UserError, on all ranks alike, where nodes run different numbers of ranks.
    """
    hosts = world.control.all_gather(world.host)
    node = Node(hosts.count(world.host), len(set(hosts)))
    if node.ranks * node.count != world.size:
        raise UserError("mpirun", f"runs {sorted(hosts.count(host) for host in set(hosts))} ranks on its nodes",
                        "start as many on each")
    watch = Stopwatch(world, node)
    gpu = world.device.type == "cuda"
    precision = "bf16" if gpu else "fp32"
    facts = torch.cuda.get_device_properties(world.device) if gpu else None
    memory = facts.total_memory if facts else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    say(f"1/4 matrix products in {precision}, attention ({'GPU' if gpu else f'{watch.cores} cores'}, "
        f"{node.ranks} ranks on each of {node.count} nodes)")
    products = [_product(watch, world.device, DTYPES[precision], *shape) for shape in (LARGE if gpu else SHAPES)]
    flops = {name: _rate(watch, world.device, dtype, 4096 if gpu else 512) for name, dtype in DTYPES.items()}
    flops[precision] = max(2 * p.m * p.n * p.k / p.seconds for p in products)
    cores = [_attention(watch, world.device, DTYPES[precision], *shape)
             for shape in (LARGE_CORES if gpu else CORES)]
    say("2/4 memory")
    moved = [_layer_between(watch, world.device, DTYPES[precision], tokens, hidden)
             for tokens, hidden in (LARGE_MOVED if gpu else MOVED)]
    copied = _copy_rate(watch, world.device)
    inside: list[Exchange] = []
    across: list[Exchange] = []
    for place, size in _groups(node):
        say(f"{3 if place == 'inside' else 4}/4 exchanges in groups of {size} {place} nodes")
        (inside if place == "inside" else across).extend(_exchanges(watch, world, node, place, size))
    return Measured(
        facts.name if facts else "CPU", memory / 2**30, facts.multi_processor_count if facts else 1, watch.cores,
        watch.threads, precision, products, flops, cores, moved, copied, node.ranks, inside, across)


def _product(watch: Stopwatch, device: torch.device, dtype: torch.dtype, m: int, n: int, k: int) -> Product:
    x = torch.randn(m, k, device=device, dtype=dtype)
    num = max(2, min(64, WEIGHTS_BYTES // (n * k * x.element_size())))
    weights = torch.randn(num, n, k, device=device, dtype=dtype)
    turn = _endless(weights)
    return Product(m, n, k, watch.call_s(lambda: F.linear(x, next(turn))))


def _endless(tensors: Tensor) -> Iterator[Tensor]:
    while True:
        yield from tensors


def _rate(watch: Stopwatch, device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return the FLOP/s of a square product."""
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / watch.call_s(lambda: a @ a)


def _attention(watch: Stopwatch, device: torch.device, dtype: torch.dtype, batch: int, seq: int, heads: int,
               head_dim: int) -> Core:
    q, k, v = (torch.randn(batch, heads, seq, head_dim, device=device, dtype=dtype, requires_grad=True)
               for _ in range(3))
    grad = torch.randn_like(q)

    def both() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(grad)

    def forward() -> None:
        with torch.no_grad():
            F.scaled_dot_product_attention(q, k, v, is_causal=True)

    forward_s = watch.call_s(forward)
    return Core(batch * seq, seq, heads, head_dim, forward_s, max(watch.call_s(both) - forward_s, 0.5 * forward_s))


def _layer_between(watch: Stopwatch, device: torch.device, dtype: torch.dtype, tokens: int, hidden: int) -> Moved:
    """Measure what a layer does between products, forward and backward: norm, bias, residual, activation.

    Counted as planner/compute does: norm 2 + 3 passes over [tokens, hidden], bias and residual 5 + 5 and the bias's
    gradient 2, GELU (2 + 3) x 4.
    """
    x, u = (torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
            for width in (hidden, 4 * hidden))
    scale, bias = (torch.ones(hidden, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    ones = torch.ones_like(x), torch.ones_like(u)

    def call() -> None:
        y = x + (F.layer_norm(x, (hidden,), scale, bias) + bias)
        torch.autograd.grad((y, F.gelu(u, approximate="tanh")), (x, u, scale, bias), ones)

    return Moved(37.0 * tokens * hidden * x.element_size(), 9, watch.call_s(call))


def _copy_rate(watch: Stopwatch, device: torch.device) -> float:
    """Return the bytes read and written a second by a copy that no cache holds."""
    source = torch.zeros((256 if device.type == "cuda" else 32) * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / watch.call_s(lambda: target.copy_(source))


def _groups(node: Node) -> Iterator[tuple[str, int]]:
    """Yield where groups lie, and their sizes."""
    yield from (("inside", size) for size in (2, 4, 8, 16, 32, 64) if node.ranks % size == 0)
    if node.ranks > 1 and node.ranks & (node.ranks - 1):
        yield "inside", node.ranks
    if node.count > 1:
        yield "across", node.count


def _exchanges(watch: Stopwatch, world: World, node: Node, place: str, size: int) -> list[Exchange]:
    """Measure groups opened as the trainer opens them: tp groups inside nodes, dp groups with a rank on each node."""
    mesh = Mesh(dp_size=world.size // size, tp_size=size) if place == "inside" else Mesh(
        dp_size=node.count, tp_size=node.ranks)
    groups = open_groups(mesh, world.rank)
    group = groups.tp if place == "inside" else groups.dp
    assert group is not None
    found = [_exchange(watch, world.device, group, size, num_bytes) for num_bytes in EXCHANGES]
    groups.close()
    return found


def _exchange(watch: Stopwatch, device: torch.device, group: Group, size: int, num_bytes: int) -> Exchange:
    """Measure an all-gather and a reduce-scatter between pieces of work, whose time is then taken off.

    In training ranks come to an exchange from work of their own, and not at the same moment: that they wait for one
    another is part of what it costs.
    """
    whole = torch.zeros(num_bytes // 4, device=device)
    part = torch.zeros(num_bytes // 4 // size, device=device)
    a = torch.randn(256, 256, device=device)

    def work() -> None:
        torch.mm(a, a)

    def both() -> None:
        work()
        gather_flat(whole, part, group)
        work()
        reduce_scatter_flat(part, whole, group)

    exchanged, alone = watch.together_s(both), watch.together_s(work)
    return Exchange(size, num_bytes, max((exchanged - 2 * alone) / 2, 1e-7))
