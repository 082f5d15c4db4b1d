"""From measurements of one machine to the few constants by which the planner knows it; measuring is train/calibrate's.

Times are seconds of one rank that has its device, or its cores, for itself; the fit chooses the constants that bring
the planner's own formulas nearest to them, by the mean of squared relative errors.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcpar.planner.hardware import (
    Chip,
    FusedAttention,
    InsideLink,
    Link,
    Machine,
    Matmul,
    Peak,
    known_machines,
    load_machine,
)
from hpcpar.planner.kernels import fused_attention_s, product_s
from hpcpar.planner.sharing import Node, as_rank_sees

CORE_TILES = ((8, 8), (16, 16), (32, 32), (64, 64))  # of a core; a GPU keeps its base's
DEPTHS = (0.0, 4.0, 8.0, 16.0, 32.0, 64.0, 100.0, 150.0, 250.0, 400.0)
NAMES = {"V100": ("v100-32g",), "A100": ("a100-40g", "a100-80g"), "H100": ("h100-80g",), "H200": ("h200",),
         "GB200": ("gb200",), "B200": ("b200",)}  # what a GPU's name holds -> machines that are like it


@dataclass(frozen=True)
class Product:
    """One product [m, k] x [k, n], launch included."""

    m: int
    n: int
    k: int
    seconds: float


@dataclass(frozen=True)
class Core:
    """One fused causal attention over `tokens` in sequences of `seq`, launches included."""

    tokens: int
    seq: int
    heads: int
    head_dim: int
    forward_s: float
    backward_s: float


@dataclass(frozen=True)
class Moved:
    """A run of `kernels` that read and write `num_bytes` and compute next to nothing."""

    num_bytes: float
    kernels: int
    seconds: float


@dataclass(frozen=True)
class Exchange:
    """One all-gather or reduce-scatter of `num_bytes` in all, in a group of `size` ranks."""

    size: int
    num_bytes: float
    seconds: float


@dataclass(frozen=True)
class Measured:
    """All that was measured, and what the device says of itself."""

    device: str
    memory_gib: float  # of the device; of the node, where its cores are shared
    units: int  # multiprocessors of a GPU; 1 for a core
    cores: int  # that the ranks of a node share; 0: each rank has a device of its own
    threads: int  # cores that a rank worked with
    precision: str  # of the products
    products: Sequence[Product]
    flops: dict[str, float]  # the best product of each precision, FLOP/s
    attention: Sequence[Core]
    moved: Sequence[Moved]
    copy_bytes_per_s: float  # read and written, of a large copy
    ranks_per_node: int
    inside: Sequence[Exchange] = ()  # empty: one rank a node
    across: Sequence[Exchange] = ()  # empty: one node


def base_of(device: str, memory_gib: float) -> Machine | None:
    """Return the known machine that a GPU's name and memory point to, or None."""
    names = next((machines for word, machines in NAMES.items() if word in device.upper()), ())
    known = [load_machine(name) for name in names if name in known_machines()]
    return min(known, key=lambda machine: abs(machine.chip.memory_gib - memory_gib), default=None)


def fit(measured: Measured, source: Sequence[str]) -> Machine:
    """Choose a machine's constants. What was not measured is the base's: the known GPU of that name, or `cpu`.

    A known GPU keeps its datasheet's peak, memory and link rates, and gets measured shares of them; of others the best
    measured rate is the peak. Cost: seconds.
    """
    known = base_of(measured.device, measured.memory_gib)
    base = known or load_machine("cpu" if measured.cores else "a100-80g")
    launch_s, moving = two_constants([(m.kernels, m.num_bytes, m.seconds) for m in measured.moved])
    rate = 1 / moving if moving else base.chip.bytes_per_s
    datasheet = base.chip.gb_per_s if known else measured.copy_bytes_per_s / 1e9
    chip = Chip(measured.memory_gib, base.chip.reserved_gib, launch_s * 1e6, datasheet, rate / datasheet / 1e9,
                base.chip.watts, 0)
    best = max(measured.flops.values())
    peak = base.peak_tflops if known else Peak(**{
        name: measured.flops.get(name, best) / 1e12 for name in ("bf16", "fp16", "fp32", "fp64")})
    inside, across = _link(base.inside, measured.inside, known), _link(base.across, measured.across, known)
    machine = Machine(f"{measured.device}, calibrated", tuple(source), chip, peak, base.matmul, base.attention,
                      InsideLink(**inside, devices=measured.ranks_per_node), Link(**across))
    machine = dataclasses.replace(machine, matmul=_products(machine, measured))
    machine = dataclasses.replace(machine, attention=_attention(machine, measured))
    return _rounded(_of_one_core(machine, measured) if measured.cores else machine)


def _rounded(machine: Machine) -> Machine:
    """Keep four digits: more were not measured."""

    def part(name: str) -> Any:
        values = vars(getattr(machine, name))
        return dataclasses.replace(getattr(machine, name), **{
            key: float(f"{value:.4g}") for key, value in values.items() if isinstance(value, float)})

    return dataclasses.replace(machine, **{field.name: part(field.name) for field in dataclasses.fields(machine)[2:]})


def two_constants(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Return (a, b) >= 0 for which a x + b y is nearest to t, rows being (x, y, t); errors count relatively to t.

    So a latency is found by small messages and a rate by large ones alike.
    """
    if not rows:
        return 0.0, 0.0
    table = np.array([(x / t, y / t) for x, y, t in rows])
    scale = np.abs(table).max(axis=0)
    scale[scale == 0] = 1.0
    ones = np.ones(len(rows))
    found = np.linalg.lstsq(table / scale, ones, rcond=None)[0]
    if found.min() < 0:  # the nearest legal pair has a zero: the better of the two that have one
        alone = [float(column @ ones / max(column @ column, 1e-300)) for column in (table / scale).T]
        left = [float(np.sum((table[:, i] / scale[i] * alone[i] - 1) ** 2)) for i in (0, 1)]
        found = np.array([alone[0], 0.0] if left[0] < left[1] else [0.0, alone[1]])
    a, b = found / scale
    return float(a), float(b)


def _link(base: Link, exchanges: Sequence[Exchange], known: Machine | None) -> dict[str, float]:
    """A ring of n has n - 1 steps and carries (n - 1) / n of the bytes."""
    if not exchanges:
        return {"gb_per_s": base.gb_per_s, "efficiency": base.efficiency, "latency_us": base.latency_us}
    latency_s, per_byte = two_constants([
        (e.size - 1, (e.size - 1) / e.size * e.num_bytes, e.seconds) for e in exchanges])
    rate = 1e-9 / per_byte if per_byte else base.gb_per_s
    datasheet = base.gb_per_s if known else rate
    return {"gb_per_s": datasheet, "efficiency": rate / datasheet, "latency_us": latency_s * 1e6}


def _products(machine: Machine, measured: Measured) -> Matmul:
    """Choose efficiency, tile and half depth; of the measured rates keep the best as a record."""
    launch_s = machine.chip.launch_us * 1e-6
    tiles = CORE_TILES if measured.cores else (machine.matmul.tile,)
    best: tuple[float, Matmul] | None = None
    for tile, depth in itertools.product(tiles, DEPTHS):
        spec = dataclasses.replace(machine.matmul, efficiency=1.0, units=measured.units, tile=tile, half_depth=depth,
                                   alignment=1 if measured.cores else machine.matmul.alignment, measured=())
        for _ in range(10):  # the share is one factor, but for what launches and memory take of a product
            trial = dataclasses.replace(machine, matmul=spec)
            errors = [math.log((product_s.__wrapped__(trial, p.m, p.n, p.k, measured.precision) + launch_s) / p.seconds)
                      for p in measured.products]
            spec = dataclasses.replace(spec, efficiency=spec.efficiency * math.exp(float(np.mean(errors))))
        cost = float(np.mean(np.square(errors)))
        if best is None or cost < best[0]:
            best = cost, spec
    assert best is not None
    top = max(measured.products, key=lambda p: p.m * p.n * p.k / p.seconds)
    rate = 2 * top.m * top.n * top.k / top.seconds / measured.threads / 1e12
    return dataclasses.replace(best[1], measured=((top.m, top.n, top.k, round(rate, 4)),))


def _attention(machine: Machine, measured: Measured) -> FusedAttention:
    """Choose both shares of the peak, launches taken off; what is mostly launches says nothing of them."""
    whole = dataclasses.replace(machine, attention=FusedAttention(1.0, 1.0))
    launch_s = machine.chip.launch_us * 1e-6

    def share(backward: bool, otherwise: float) -> float:
        logs = []
        for core in measured.attention:
            seconds, launches = (core.backward_s, 3 * launch_s) if backward else (core.forward_s, launch_s)
            if launches < 0.5 * seconds:
                full = fused_attention_s(whole, core.tokens, core.seq, core.heads, core.head_dim, measured.precision,
                                         backward)
                logs.append(math.log(full / (seconds - launches)))
        return math.exp(float(np.mean(logs))) if logs else otherwise

    return FusedAttention(share(False, machine.attention.forward), share(True, machine.attention.backward))


def _of_one_core(machine: Machine, measured: Measured) -> Machine:
    """Turn what a rank with several threads does into what one core does: the form that the planner shares out."""
    peak = {name: rate / measured.threads for name, rate in dataclasses.asdict(machine.peak_tflops).items()}
    chip = dataclasses.replace(machine.chip, gb_per_s=machine.chip.gb_per_s / measured.threads, cores=measured.cores)
    return dataclasses.replace(machine, chip=chip, peak_tflops=Peak(**peak))


def worst_product(machine: Machine, measured: Measured) -> float:
    """Return the largest relative error of the products, as the fitted machine foretells them."""
    seen = as_rank_sees(machine, Node(measured.ranks_per_node, measured.cores))
    launch_s = machine.chip.launch_us * 1e-6
    return max(abs((product_s.__wrapped__(seen, p.m, p.n, p.k, measured.precision) + launch_s) / p.seconds - 1)
               for p in measured.products)
