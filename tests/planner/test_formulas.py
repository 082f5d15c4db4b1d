"""The published formulas that no other test of this folder holds: memory beside the layers, and volumes on the wires.

Parameters, FLOPs, PF-days: test_flops. Activations, states, worked figures: test_memory. Bubbles, in flight:
test_timeline. Rings: test_compute. Young and Daly: test_plan. Exchanges of tp: tests/layout/test_traffic.
"""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.published import DEEPSPEED_BF16, PRACTICES
from hpcpar.layout.layout import Layout
from hpcpar.layout.mesh import Coordinates
from hpcpar.layout.traffic import Traffic, wire_bytes
from hpcpar.planner.hardware import Link, load_machine
from hpcpar.planner.memory import embedding_bytes, layer_activation_bytes, stage_memory, state_memory
from hpcpar.planner.practice import Practice
from hpcpar.planner.step import Pricing
from hpcpar.planner.timeline import held
from tests.planner.jobs import job_of, mt_nlg

PUBLISHED = Practice(flash=0, dropout=True, keeps_gathered=False, stops_early=False, recomputes_projections=False)


def test_mt_nlg_counts_20_bytes_a_parameter() -> None:
    """Smith et al. 2022, arXiv 2201.11990, section 2.1: 2 + 2 of weights and gradients, 4 accumulated, 12 of Adam."""
    practice = dataclasses.replace(PRACTICES["mtnlg22"], **DEEPSPEED_BF16)
    assert state_memory(1, 8, 0, "bf16", practice).states == 20


def test_fewer_microbatches_than_stages_hold_that_share_of_the_layers() -> None:
    """The first 1F1B stage holds l layers' worth, or m/p of it. Source: Korthikanti et al. 2022, section 4.2.3."""
    model, stages = mt_nlg().model, 35
    for microbatches in (5, 20, 35, 240):
        layers_worth = held("1f1b", stages, microbatches, 1)[0] * model.layers / stages
        assert layers_worth == model.layers * min(1, microbatches / stages)


def test_the_embedding_keeps_token_numbers_and_a_mask() -> None:
    """8sbp + sbhp on the first of p stages, the mask shared out under sequence parallelism."""
    model, p, b = mt_nlg().model, 35, 2
    s, h = model.seq, model.hidden
    assert p * embedding_bytes(model, 8, False, b, PUBLISHED) == 8 * s * b * p + s * b * h * p
    assert embedding_bytes(model, 8, True, b, PUBLISHED) == 8 * s * b + s * b * h / 8
    job = mt_nlg(layout={"sequence_parallel": False})
    ends = [stage_memory(job, 3, 10**9, p, first, False, PUBLISHED).activations for first in (True, False)]
    assert ends[0] - ends[1] == p * embedding_bytes(model, 8, False, 1, PUBLISHED)


def test_a_gpt_layer_of_any_mlp_width_keeps_18_and_4_ffn_over_h() -> None:
    model = dataclasses.replace(mt_nlg().model, ffn=3 * 20480)
    kept = layer_activation_bytes(model, 1, False, 1, "selective", "bf16", PUBLISHED)
    assert kept == pytest.approx(model.seq * model.hidden * (18 + 4 * 3))


@pytest.mark.parametrize("zero", [0, 1])
def test_gradients_and_weights_move_twice_p_over_tp_and_pp(zero: int) -> None:
    """2 (d-1)/d P/(tp pp) elements a step: an all-reduce, or a reduce-scatter and an all-gather of as many."""
    job = job_of(8, 256, 8, 2, 2, 4, 16, model={"seq": 64, "vocab": 1000}, layout={"zero": zero},
                 train={"precision": "fp32"})
    of = Traffic(Layout(job), Coordinates(0, 0, 0, 0))
    numel = sum(bucket.numel for bucket in of.layout.buckets(0, 0))
    calls = [c for c in of.step(of.layout.program(0, of.layout.num_microbatches)) if c.group == "dp"]
    assert sum(wire_bytes(c, 4) for c in calls) / 4 == pytest.approx(2 * 3 / 4 * numel)


@pytest.mark.parametrize("chunks", [2, 4])
def test_interleaving_sends_v_times_as_much_between_stages(chunks: int) -> None:
    def sent(schedule: str, chunks: int) -> float:
        job = job_of(16, 256, 8, 1, 4, 1, 8, model={"seq": 64, "vocab": 1000},
                     layout={"schedule": schedule, "chunks": chunks})
        layout = Layout(job)
        total = 0.0
        for rank in range(4):
            of = Traffic(layout, Coordinates(rank, 0, 0, 0))
            program = layout.program(rank, 8)
            total += sum(c.num_bytes for a in program for c in of.during(a) if c.op == "send")
        return total

    # 3 boundaries; with v chunks 4v - 1, since each round ends where the next begins
    assert sent("interleaved", chunks) / sent("1f1b", 1) == pytest.approx((4 * chunks - 1) / 3)


def test_zero_3_moves_half_as_much_again() -> None:
    """Rajbhandari et al. 2020, section 7: 3P instead of 2P. On a network so slow that nothing hides it."""
    machine = dataclasses.replace(load_machine("a100-80g"), across=Link(1e-4, 1.0, 0.0))
    data = {}
    for zero in (1, 3):
        job = job_of(8, 1024, 8, 1, 1, 16, 16, model={"seq": 64, "vocab": 8}, train={"precision": "fp32"},
                     layout={"zero": zero, "recompute": "none"})
        data[zero] = Pricing(job, machine).step().parts["data"]
    assert data[3] / data[1] == pytest.approx(1.5, rel=0.02)
