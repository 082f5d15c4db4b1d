"""The fit finds the constants of a machine again from what that machine would measure."""

from __future__ import annotations

import dataclasses
import tomllib

import pytest

from hpcpar.planner.calibration import (
    Core,
    Exchange,
    Measured,
    Moved,
    Product,
    base_of,
    fit,
    two_constants,
    worst_product,
)
from hpcpar.planner.hardware import Machine, load_machine, machine_from_tables, machine_toml
from hpcpar.planner.kernels import fused_attention_s, moved_s, product_s
from hpcpar.planner.network import gather_s, ring

SHAPES = [(128, 64, 256), (512, 512, 512), (64, 64, 512), (1024, 1024, 1024), (2048, 512, 2048), (304, 1216, 512)]
LARGE = [*SHAPES, (4096, 4096, 4096), (8192, 2048, 8192)]


def as_measured(machine: Machine, precision: str, shapes: list[tuple[int, int, int]], **more: object) -> Measured:
    """What a machine that behaves exactly as the planner's formulas say would measure."""
    launch_s, devices = machine.chip.launch_us * 1e-6, machine.inside.devices

    def core(tokens: int, seq: int, heads: int, head_dim: int) -> Core:
        forward, backward = (fused_attention_s(machine, tokens, seq, heads, head_dim, precision, back)
                             for back in (False, True))
        return Core(tokens, seq, heads, head_dim, forward + launch_s, backward + 3 * launch_s)

    products = [Product(m, n, k, product_s(machine, m, n, k, precision) + launch_s) for m, n, k in shapes]
    best = max(2 * p.m * p.n * p.k / p.seconds for p in products)
    values: dict[str, object] = {
        "device": machine.name, "memory_gib": machine.chip.memory_gib, "units": machine.matmul.units, "cores": 0,
        "threads": 1, "precision": precision, "products": products, "flops": {precision: best},
        "attention": [core(512, 128, 2, 64), core(8192, 2048, 16, 128)],
        "moved": [Moved(b, 9, moved_s(machine, b, 9)) for b in (1e4, 1e6, 1e8)],
        "copy_bytes_per_s": machine.chip.gb_per_s * 1e9, "ranks_per_node": devices,
        "inside": [Exchange(n, b, gather_s(machine, ring(machine, n, 1), b))
                   for n in (2, devices) for b in (1e4, 1e6, 1e8)],
    }
    return Measured(**(values | more))  # type: ignore[arg-type]


def test_two_constants_are_found_again_and_are_never_negative() -> None:
    rows = [(x, y, 2e-6 * x + 3e-9 * y) for x, y in ((1, 1e3), (1, 1e6), (7, 1e5), (7, 1e8))]
    assert two_constants(rows) == pytest.approx((2e-6, 3e-9))
    assert two_constants([(1.0, y, 3e-9 * y * (1 if y > 1e4 else 0.5)) for y in (1e3, 1e5, 1e7)])[0] == 0.0
    assert two_constants([]) == (0.0, 0.0)


def test_a_known_gpu_keeps_its_datasheet_and_gets_its_own_shares() -> None:
    """An A100 whose products, memory, attention and links are all slower than the table's."""
    known = load_machine("a100-80g")
    slow = dataclasses.replace(
        known, name="NVIDIA A100-SXM4-80GB", chip=dataclasses.replace(known.chip, gb_efficiency=0.7, launch_us=7.0),
        matmul=dataclasses.replace(known.matmul, efficiency=0.6, half_depth=150.0),
        attention=dataclasses.replace(known.attention, forward=0.4, backward=0.3),
        inside=dataclasses.replace(known.inside, efficiency=0.5, latency_us=9.0))
    measured = as_measured(slow, "bf16", LARGE)
    found = fit(measured, ["a test"])
    assert (found.peak_tflops, found.across) == (known.peak_tflops, known.across)
    assert found.chip.gb_per_s == known.chip.gb_per_s
    assert (found.chip.gb_efficiency, found.chip.launch_us) == pytest.approx((0.7, 7.0), rel=1e-3)
    assert (found.inside.efficiency, found.inside.latency_us) == pytest.approx((0.5, 9.0), rel=1e-3)
    assert (found.attention.forward, found.attention.backward) == pytest.approx((0.4, 0.3), rel=0.01)
    assert found.matmul.half_depth == 150
    assert found.matmul.efficiency == pytest.approx(0.6, rel=0.01)
    assert worst_product(found, measured) < 0.01


def test_cores_that_ranks_share_are_written_as_one_core_of_the_node() -> None:
    core = load_machine("cpu")
    measured = as_measured(core, "fp32", SHAPES, device="CPU", cores=4, threads=2, memory_gib=16.0,
                           ranks_per_node=2)
    found = fit(measured, ["a test"])
    assert (found.chip.cores, found.chip.memory_gib, found.inside.devices) == (4, 16.0, 2)
    assert found.chip.gb_per_s == pytest.approx(core.chip.gb_per_s / 2, rel=1e-3)  # two threads moved it
    assert worst_product(found, measured) < 0.1
    assert found.peak_tflops.fp32 * found.matmul.efficiency * 2 == pytest.approx(
        core.peak_tflops.fp32 * core.matmul.efficiency, rel=0.1)


def test_what_is_written_is_read_again() -> None:
    found = fit(as_measured(load_machine("cpu"), "fp32", SHAPES, device="CPU", cores=2), ["a test of some length"])
    again = machine_from_tables(found.name, tomllib.loads(machine_toml(found)))
    assert dataclasses.asdict(again) == dataclasses.asdict(found)


def test_gpus_are_known_by_name_and_memory() -> None:
    for device, memory_gib, name in (
            ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40g"), ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80g"),
            ("Tesla V100-SXM2-32GB", 31.7, "v100-32g"), ("NVIDIA H100 80GB HBM3", 79.1, "h100-80g"),
            ("NVIDIA H200", 139.8, "h200"), ("NVIDIA GB200", 184.0, "gb200"), ("NVIDIA B200", 178.0, "b200")):
        found = base_of(device, memory_gib)
        assert found is not None
        assert found.name == name
    assert base_of("CPU", 16.0) is None
    assert base_of("Radeon", 16.0) is None


def test_an_unknown_gpu_has_its_best_rate_for_a_peak() -> None:
    measured = as_measured(load_machine("a100-80g"), "bf16", LARGE, device="Some GPU")
    found = fit(measured, ["a test"])
    assert found.peak_tflops.bf16 == pytest.approx(measured.flops["bf16"] / 1e12, rel=1e-3)
    assert worst_product(found, measured) < 0.05
