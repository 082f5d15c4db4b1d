from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks.published import MEGATRON_2022, layer_rows
from hpcpar.planner.compute import Cut, layer_time
from hpcpar.planner.hardware import load_machine
from hpcpar.planner.kernels import fused_attention_s, product_s
from hpcpar.planner.network import gather_s, message_s, reduce_s, ring
from hpcpar.planner.practice import TRAINER
from hpcpar.planner.step import Pricing
from tests.planner.jobs import job_of, yuan

A100 = "a100-80g"


def test_one_published_layer() -> None:
    """Korthikanti et al. 2022, table 4: forward and backward of one layer, in five modes."""
    rows = list(layer_rows())
    assert len(rows) == 5
    for row in rows:
        time = layer_time(row.cut, load_machine(A100), MEGATRON_2022, row.recompute)
        assert 1e3 * time.forward.total == pytest.approx(row.forward_ms, rel=0.1), row.name
        assert 1e3 * (time.backward.total + time.again.total) == pytest.approx(row.backward_ms, rel=0.15), row.name


def test_a_wave_more_is_paid_in_full() -> None:
    machine = load_machine(A100)
    rows, columns = machine.matmul.tile
    full = product_s(machine, rows * 12, columns * 9, 8192, "bf16")  # 108 tiles on 108 units
    more = product_s(machine, rows * 12, columns * 9 + 64, 8192, "bf16")
    assert more > 1.15 * full


def test_odd_widths_and_shallow_products_are_slow() -> None:
    machine = load_machine(A100)

    def rate(m: int, n: int, k: int) -> float:
        return m * n * k / product_s(machine, m, n, k, "bf16")

    assert rate(4096, 4096, 4097) < 0.3 * rate(4096, 4096, 4096)
    assert rate(4096, 4096, 1800) < 0.9 * rate(4096, 4096, 1792)
    assert rate(4096, 4096, 64) < 0.6 * rate(4096, 4096, 4096)


def test_a_product_of_a_vector_goes_at_the_memorys_speed() -> None:
    machine = load_machine(A100)
    moved = 2 * (8192 * 8192 + 8192 + 8192)
    assert product_s(machine, 1, 8192, 8192, "bf16") == pytest.approx(moved / machine.chip.bytes_per_s)


def test_fused_attention_halves_its_work_and_backward_has_more() -> None:
    machine = load_machine(A100)
    forward = fused_attention_s(machine, 65536, 65536, 8, 128, "bf16", backward=False)
    full = 4 * 65536 * 65536 * 8 * 128 / (machine.peak_flops("bf16") * machine.attention.forward)
    assert forward == pytest.approx(full / 2, rel=0.01)
    assert fused_attention_s(machine, 65536, 65536, 8, 128, "bf16", backward=True) > 2.5 * forward
    assert fused_attention_s(machine, 65536, 65536, 16, 64, "bf16", backward=False) > forward


def test_rings_are_alpha_beta() -> None:
    machine = load_machine(A100)
    inside, across = machine.inside, machine.across
    group, num_bytes = ring(machine, 8, 1), 1e9
    alpha, beta = inside.latency_us * 1e-6, inside.bytes_per_s
    assert reduce_s(machine, group, num_bytes) == pytest.approx(2 * 7 * (alpha + num_bytes / (8 * beta)))
    assert gather_s(machine, group, num_bytes) == reduce_s(machine, group, num_bytes) / 2
    apart = ring(machine, 16, 8)  # one member a node
    assert apart.num_nodes == 16
    assert gather_s(machine, apart, num_bytes) == pytest.approx(
        15e-6 * across.latency_us + 1e-6 * across.latency_us + 15 / 16 * num_bytes / across.bytes_per_s, rel=1e-3)
    assert gather_s(machine, ring(machine, 1, 1), num_bytes) == 0
    assert message_s(machine, num_bytes, inside=True) < message_s(machine, num_bytes, inside=False)


def test_two_members_a_node_share_two_adapters() -> None:
    machine = load_machine(A100)
    one, two = ring(machine, 8, 8), ring(machine, 8, 4)
    assert (one.per_node, two.per_node) == (1, 2)
    assert gather_s(machine, one, 1e9) / gather_s(machine, two, 1e9) == pytest.approx(2, rel=0.02)


def test_tensor_parallelism_across_nodes_is_under_a_quarter_as_fast(tmp_path: Path) -> None:
    """LiBai's measurements on V100, one 100 Gb/s adapter a node: 36.85 TFLOP/s a GPU at tp 4, 3.57 at tp 32."""
    path = tmp_path / "one-adapter.toml"
    path.write_text('base = "v100-32g"\n[across]\ngb_per_s = 1.5625\n', encoding="utf-8")
    machine = load_machine(str(path))
    job = job_of(24, 2304, 32, 8, 1, 1, 16, model={"ffn": 9216}, train={"precision": "fp16", "microbatch": 4},
                 layout={"recompute": "none"})

    def tokens_per_s_per_gpu(tp: int) -> float:
        cut = Cut(job.model, 4, tp, 1, True, "fp16")
        time = layer_time(cut, machine, TRAINER, "none")
        return cut.tokens / (time.forward.total + time.backward.total) / tp

    inside = tokens_per_s_per_gpu(8)
    assert tokens_per_s_per_gpu(16) < 0.25 * inside
    assert tokens_per_s_per_gpu(32) < 0.25 * inside


def test_recomputation_adds_about_a_forward() -> None:
    job, machine = yuan(), load_machine(A100)
    cut = Cut(job.model, 1, 8, 1, True, "bf16")
    full = layer_time(cut, machine, dataclasses.replace(TRAINER, stops_early=False), "full")
    early = layer_time(cut, machine, TRAINER, "full")
    assert full.again == full.forward
    assert early.again.total == pytest.approx(full.again.total - full.forward.tensor / 4)  # one exchange less
    assert layer_time(cut, machine, TRAINER, "none").again.total == 0


def test_exchanges_in_pieces_lie_beside_products_on_gpus_only() -> None:
    """Of p equal pieces one is left over in forward; in backward the sums lie beside the weights' gradients too."""
    model, machine = yuan().model, load_machine(A100)
    whole, halves, eighths = (layer_time(Cut(model, 1, 8, 1, True, "bf16", pieces), machine, TRAINER, "none")
                              for pieces in (1, 2, 8))
    assert 0.5 * whole.forward.tensor < halves.forward.tensor < 0.8 * whole.forward.tensor
    put_off = layer_time(Cut(model, 1, 8, 1, True, "bf16", 2, puts_off=True), machine, TRAINER, "none")
    assert halves.backward.tensor < halves.forward.tensor < 1.1 * put_off.backward.tensor
    assert halves.forward.total + halves.backward.total < whole.forward.total + whole.backward.total
    assert eighths.forward.matmul > 1.05 * whole.forward.matmul  # 256 tokens at a time
    on_cores = [layer_time(Cut(model, 1, 8, 1, True, "fp32", pieces), load_machine("cpu"), TRAINER, "none")
                for pieces in (1, 2)]
    assert on_cores[1].forward.tensor >= on_cores[0].forward.tensor


def test_more_of_anything_takes_longer() -> None:
    machine = load_machine(A100)
    plain = Pricing(yuan(), machine).step().total
    assert Pricing(yuan(train={"global_batch": 6720}), machine).step().total > 1.9 * plain
    slow = dataclasses.replace(machine, across=dataclasses.replace(machine.across, gb_per_s=1.0))
    assert Pricing(yuan(), slow).step().total > 1.02 * plain
