"""Every layout against one process: loss, gradient norm, every gradient, and every weight, step by step.

Rows that cover all pairs take 6 steps, past the warm-up's 3 and the ramp's 4; every 24th takes 20, and all of them do
in `make parity-all PARITY_SAMPLE=pairs`.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from hpcpar.config.load import override
from hpcpar.train.parity import compare
from tests.parity.jobs import MESHES, all_pairs, job_of, name_of, random_tokens

pytestmark = pytest.mark.mpi
PLAIN = {"schedule": "1f1b", "sequence_parallel": True, "tied": True, "kind": "gpt", "vocab": 61, "spare_layers": 1,
         "kv_heads": 8, "clip": 0.05, "accumulation": 2, "recompute": "none", "dropout": 0.1, "zero": 1, "ramp": False}


@pytest.mark.parametrize(("choice", "steps"), [
    pytest.param(choice, 6 if number % 24 else 20, id=name_of(choice)) for number, choice in enumerate(all_pairs())])
def test_float64_equals_one_process(world, choice, steps, request):
    if choice["zero"] == 3:
        request.getfixturevalue("apart")
    job = job_of(choice)
    found = compare(job, world, random_tokens(choice["vocab"], 8), steps, 1e-10)
    assert found.first == ""
    assert len(found.losses) == steps and found.losses[-1] != found.losses[0]


@pytest.mark.parametrize(("schedule", "mesh", "changes"), [
    ("interleaved", (2, 2, 2), {"zero": 3}), ("interleaved", (1, 8, 1), {"kind": "llama", "accumulation": 1}),
    ("breadth-first", (1, 4, 2), {"zero": 0}), ("zero-bubble", (2, 4, 1), {"accumulation": 6}),
    ("zero-bubble", (2, 2, 2), {"recompute": "full", "kind": "llama", "zero": 3, "apart": True}),
    ("zbv", (2, 2, 2), {"accumulation": 4, "zero": 2, "apart": True}),
    ("zbv", (1, 8, 1), {"accumulation": 5, "tied": False}),
    ("dualpipev", (1, 4, 2), {"accumulation": 1, "zero": 3, "apart": True}),
    ("dualpipev", (2, 2, 2), {"recompute": "selective", "sequence_parallel": False, "zero": 2}),
], ids=str)
def test_every_schedule_equals_one_process(world, schedule, mesh, changes, request):
    if changes.get("apart"):
        request.getfixturevalue("apart")
    choice = {**PLAIN, "schedule": schedule, "mesh": mesh, **changes}
    assert compare(job_of(choice), world, random_tokens(61, 8), 4, 1e-10).first == ""


@pytest.mark.parametrize(("mesh", "zero", "changes"), [
    ((1, 1, 8), (1, 2), {}), ((1, 1, 8), (3, 4), {"kind": "llama", "kv_heads": 2, "recompute": "full"}),
    ((2, 1, 4), (2, 2), {"kind": "llama", "sequence_parallel": False, "tied": False}),
    ((1, 2, 4), (3, 2), {"schedule": "zero-bubble", "accumulation": 3}), ((1, 2, 4), (1, 2), {"ramp": True}),
    ((1, 2, 4), (2, 4), {"schedule": "gpipe"}),
], ids=str)
def test_hybrid_sharding_equals_one_process(world, apart, mesh, zero, changes):
    """Runs of 2 or 4 dp ranks that share one copy, all of dp among them."""
    choice = {**PLAIN, "mesh": mesh, "zero": zero, **changes}
    assert compare(job_of(choice), world, random_tokens(61, 8), 6, 1e-10).first == ""


def test_hybrid_sharding_in_common_memory_equals_one_process(world):
    choice = {**PLAIN, "mesh": (2, 1, 4), "zero": (3, 2)}
    assert compare(job_of(choice), world, random_tokens(61, 8), 6, 1e-10).first == ""


@pytest.mark.parametrize(("mesh", "changes"), [
    ((4, 1, 2), {"kind": "llama", "z_loss": 0.01}), ((1, 2, 4), {"schedule": "gpipe"}),
    ((2, 2, 2), {"schedule": "zero-bubble", "sequence_parallel": False}),
], ids=str)
def test_a_loss_in_chunks_equals_one_process(world, mesh, changes, monkeypatch):
    """8 tokens in chunks of 2, 3 and 3."""
    monkeypatch.setattr("hpcpar.layout.loss.LEAST_TOKENS", 3)
    monkeypatch.setattr("hpcpar.layout.loss.CHUNK_BYTES", 1)
    assert compare(job_of({**PLAIN, "mesh": mesh, **changes}), world, random_tokens(61, 8), 4, 1e-10).first == ""


@pytest.mark.parametrize(("mesh", "pieces", "changes"), [
    ((2, 1, 4), 4, {}), ((2, 2, 2), 2, {"schedule": "zero-bubble", "kind": "llama", "kv_heads": 2}),
    ((4, 2, 1), 2, {"recompute": "selective", "zero": 0, "kv_heads": 2}),
    ((4, 1, 2), 2, {"recompute": "full", "zero": 3, "kind": "llama", "kv_heads": 2}),
], ids=str)
def test_exchanges_in_pieces_equal_one_process(world, mesh, pieces, changes, request):
    """With two sequences a microbatch; the rows above have one."""
    if changes.get("zero") == 3:
        request.getfixturevalue("apart")
    job = job_of({**PLAIN, "mesh": mesh, "tp_overlap": pieces, **changes})
    job = override(job, train={"microbatch": 2, "global_batch": 2 * job.train.global_batch})
    assert compare(job, world, random_tokens(61, 8), 4, 1e-10).first == ""


@pytest.mark.parametrize("changes", [{}, {"kind": "llama", "recompute": "selective"}], ids=str)
def test_exchanges_in_pieces_around_compiled_parts_equal_one_process(world, changes, monkeypatch):
    """What lies between products is compiled, as far as needs no C++ compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    job = job_of({**PLAIN, "mesh": (2, 1, 1), "tp_overlap": 2, "spare_layers": 0, **changes})
    job = override(job, train={"compile": True})
    assert compare(job, world, random_tokens(61, 8), 2, 1e-10).first == ""


@pytest.mark.parametrize("mesh", [m for m in MESHES if m[0] * m[1] * m[2] == 8], ids=str)
def test_float32_loss_and_gradient_norm(world, mesh):
    job = job_of({**PLAIN, "mesh": mesh}, "fp32")
    assert compare(job, world, random_tokens(61, 8), 8, 1e-5).first == ""


def test_same_layout_is_bit_equal(world):
    job = job_of({**PLAIN, "mesh": (2, 2, 2)})
    runs = [compare(job, world, random_tokens(61, 8), 5, 1e-10).losses for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(("precision", "zero"), [("bf16", 1), ("fp16", 2), ("bf16", 3)])
def test_low_precision_follows_one_process(world, apart, precision, zero):
    """The order of sums shows at 8 or 11 bits; a wrong sum would show far above them."""
    job = job_of({**PLAIN, "mesh": (2, 2, 2), "dropout": 0.0, "zero": zero}, precision)
    found = compare(job, world, random_tokens(61, 8), 3, 0.05)
    assert found.loss < 0.05 and found.losses


def test_a_wrong_gradient_is_named(world, monkeypatch):
    """The comparison itself can fail: without the sum over tp a norm's gradient is partial."""
    from hpcpar.parallel.reduction import Reduction

    monkeypatch.setattr(Reduction, "_sum_over_tp", lambda self, flat: None)
    found = compare(job_of({**PLAIN, "mesh": (2, 1, 1)}), world, random_tokens(61, 8), 2, 1e-10)
    assert "at step 0" in found.first and found.grads > 1e-10
