"""Published memory formulas, and the exact lengths of the trainer's buckets."""

from __future__ import annotations

import dataclasses

import pytest

from hpcpar.config.job import Model
from hpcpar.layout.layout import Layout
from hpcpar.planner.memory import layer_activation_bytes, logits_bytes, state_memory
from hpcpar.planner.params import rank_counts, total_parameters
from hpcpar.planner.plan import bucket_lengths, make_plan
from hpcpar.planner.practice import TRAINER, Practice
from hpcpar.planner.timeline import held
from tests.planner.jobs import job_of, mt_nlg, yuan

# what Korthikanti et al. 2022 (arXiv 2205.05198) describe: scores in memory, dropout, inputs gathered again
PUBLISHED = Practice(flash=0, dropout=True, keeps_gathered=False, stops_early=False, recomputes_projections=False)
GIB = 2**30


def activation(model: Model, tp: int, sequence_parallel: bool, recompute: str, practice: Practice = PUBLISHED) -> float:
    return layer_activation_bytes(model, tp, sequence_parallel, 2, recompute, "fp16", practice)


@pytest.mark.parametrize("tp", [1, 8])
def test_korthikantis_table_of_activations(tp: int) -> None:
    model = mt_nlg().model
    s, b, h, a, t = model.seq, 2, model.hidden, model.heads, tp
    sbh = s * b * h
    assert activation(model, tp, False, "none") == pytest.approx(sbh * (10 + 24 / t + 5 * a * s / (h * t)))
    assert activation(model, tp, True, "none") == pytest.approx(sbh / t * (34 + 5 * a * s / h))
    assert activation(model, tp, True, "selective") == pytest.approx(34 * sbh / t)
    assert activation(model, tp, False, "full") == 2 * sbh
    if tp == 1:
        assert activation(model, tp, False, "none") == pytest.approx(sbh * (34 + 5 * a * s / h))
        wider = dataclasses.replace(model, ffn=3 * h)
        assert activation(wider, tp, True, "selective") == pytest.approx(sbh * (18 + 4 * 3))


def test_flash_attention_keeps_no_scores() -> None:
    model = mt_nlg().model
    flash = dataclasses.replace(PUBLISHED, flash=2)
    scores = activation(model, 8, True, "none") - activation(model, 8, True, "none", flash)
    statistics = 4 * 2 * model.seq * model.heads / 8  # one fp32 number a row of scores
    assert scores == pytest.approx(5 * model.heads * 2 * model.seq**2 / 8 - statistics)


def test_fp32_logits_and_their_input() -> None:
    """4sbh(1 + V/h): the final norm's and the head's input, and logits in fp32."""
    model = yuan(model={"vocab": 53248}).model
    published = dataclasses.replace(PUBLISHED, logits_bytes=4)
    s, h, v = model.seq, model.hidden, model.vocab
    assert logits_bytes(model, 1, 1, published) + 4 * s * h == 4 * s * h * (1 + v / h)


@pytest.mark.parametrize(("job", "states", "full", "selective"), [
    (yuan(), 13.6, 4.75, 10.1), (mt_nlg(), 31.7, 8.2, 17.4), (job_of(96, 12288, 96, 8, 16, 8, 1536), 22.9, 4.5, 9.6),
    (job_of(128, 25600, 160, 8, 64, 6, 3072), 33.0, 12.5, 26.6)], ids=["yuan", "mt-nlg", "gpt3", "1T"])
def test_worked_figures_a_gpu(job: object, states: float, full: float, selective: float) -> None:
    """18 bytes a parameter; the first 1F1B stage holds l layers' worth of activations."""
    model, wish = job.model, job.layout  # type: ignore[attr-defined]
    assert 18 * total_parameters(model) / (wish.tp * wish.pp) / GIB == pytest.approx(states, rel=0.01)
    in_flight = held("1f1b", wish.pp, wish.pp, 1)[0] * model.layers / wish.pp
    for recompute, sequence_parallel, expected in (("full", False, full), ("selective", True, selective)):
        layer = layer_activation_bytes(model, 8, sequence_parallel, 1, recompute, "bf16", PUBLISHED)
        assert in_flight * layer / GIB == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("zero", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zeros_7_5b_on_64_gpus(zero: int, gigabytes: float) -> None:
    """Rajbhandari et al. 2020, figure 1: 2 + 2 + 12 bytes, each divided or not."""
    practice = Practice(grad_bytes=2)
    found = state_memory(7_500_000_000, 64, zero, "fp16", practice).states / 1e9
    assert found == pytest.approx(gigabytes, abs=0.05)
    per_parameter = found * 1e9 / 7.5e9
    assert per_parameter == pytest.approx({0: 16, 1: 4 + 12 / 64, 2: 2 + 14 / 64, 3: 16 / 64}[zero])


def test_fp32_gradients_make_18_bytes_and_plain_precision_no_second_copy() -> None:
    assert state_memory(1, 1, 0, "bf16").states == 18
    assert state_memory(1, 1, 0, "fp32").states == 16
    assert state_memory(1, 1, 0, "fp64").states == 32


@pytest.mark.parametrize("change", [
    {}, {"model": {"tied": False}}, {"model": {"kind": "llama", "heads": 8, "kv_heads": 2}, "layout": {"tp": 4}},
    {"layout": {"pp": 3, "dp": 2}}, {"model": {"vocab": 1003}, "layout": {"tp": 4, "pp": 2}},
    {"layout": {"pp": 2, "chunks": 2, "schedule": "interleaved"}},
    {"layout": {"pp": 2, "chunks": 2, "schedule": "zbv"}},
    {"layout": {"zero": 0, "dp": 4}}, {"train": {"precision": "fp32"}},
    {"layout": {"zero": 3, "tp": 2, "pp": 2, "dp": 4}}, {"layout": {"zero": 2, "pp": 2, "dp": 3}},
    {"layout": {"zero": 3, "dp": 2}, "train": {"precision": "fp32"}}, {"layout": {"zero": [3, 2], "tp": 2, "dp": 8}},
    {"layout": {"zero": [1, 4], "dp": 8}},
], ids=str)
def test_states_are_the_buckets_lengths(change: dict[str, dict[str, object]]) -> None:
    job = job_of(8, 256, 8, 1, 1, 1, 48, **{"model": {"vocab": 1000, "seq": 64}} | change)
    layout, plan = Layout(job), make_plan(job)
    for rank, memory in enumerate(plan.memory):
        buckets = layout.buckets(rank, 0)
        numel = sum(b.numel for b in buckets)
        owned = sum(b.shard(layout.num_shards, 0)[1] for b in buckets)
        element, mixed = (4, False) if job.train.precision == "fp32" else (2, True)
        assert memory.weights == element * (owned if job.layout.zero_stage == 3 else numel)
        assert memory.gradients == 4 * (owned if job.layout.zero_stage >= 2 else numel)
        assert memory.moments == 8 * owned
        assert memory.master == (4 * owned if mixed else 0)
        # without padding, the quick count of the search
        exact = sum(slot.numel for b in buckets for slot in b.slots)
        assert plan.pricing.rank_numel(rank) == exact
    assert bucket_lengths(layout) == [sum(b.numel for b in layout.buckets(r, 0)) for r in range(len(plan.memory))]


def test_counts_of_the_whole_are_the_tables() -> None:
    job = job_of(5, 96, 4, 1, 1, 1, 8, model={"vocab": 101, "seq": 16})
    layout = Layout(job)
    assert total_parameters(job.model) == sum(p.numel for p in layout.table)
    padding = (-101 % 8) * 96
    assert rank_counts(job.model, 1).stage(5, True, True) == total_parameters(job.model) + padding


def test_what_hpcpar_keeps_is_less_without_dropout_and_scores() -> None:
    model = yuan().model
    assert activation(model, 8, True, "none", TRAINER) < activation(model, 8, True, "none", PUBLISHED)
