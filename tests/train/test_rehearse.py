"""One rank played alone: its memory, calls and arithmetic are those that the layout and the formulas foretell."""

from __future__ import annotations

import pytest
import torch

from hpcpar.cli import main
from hpcpar.comm.groups import open_groups
from hpcpar.comm.silent_backend import SilentGroup, silent_world
from hpcpar.config.job import Job
from hpcpar.config.load import override
from hpcpar.config.resolve import resolve
from hpcpar.layout.layout import Layout
from hpcpar.layout.traffic import Call, Traffic
from hpcpar.parallel.build import build
from hpcpar.planner.plan import make_plan
from hpcpar.train.rehearse import STATES, Ledger, describe, rehearse, state_bytes, steady_microbatches
from hpcpar.train.state import Progress
from hpcpar.train.step import Trainee, compute_gradients
from tests.parity.jobs import all_pairs, job_of, name_of, random_tokens

CPU = torch.device("cpu")
PLAIN = {"schedule": "1f1b", "sequence_parallel": True, "tied": True, "kind": "gpt", "vocab": 61, "spare_layers": 1,
         "kv_heads": 8, "clip": 0.05, "accumulation": 2, "recompute": "none", "dropout": 0.0, "zero": 1, "ramp": False}


def trainee_of(layout, rank):
    groups = open_groups(layout.mesh, rank)
    pipeline, optimizer = build(layout, groups, CPU)
    return Trainee(layout, groups, pipeline, optimizer, CPU)


@pytest.mark.parametrize("precision, choice", [("bf16", choice) for choice in all_pairs()] + [
    (precision, choice) for precision in ("fp64", "fp32") for choice in all_pairs()[::8]],
    ids=lambda value: value if isinstance(value, str) else name_of(value))
def test_state_bytes_follow_from_the_layout(precision, choice):
    """By ZeRO shard: master weights (apart in 16 bits only) and moments; from 2 on gradients; from 3 on weights."""
    layout = Layout(job_of(choice, precision))
    for rank in {0, layout.mesh.size - 1}:
        at = layout.mesh.coordinates(rank)
        numel = sum(bucket.numel for bucket in layout.buckets(at.pp_rank, at.tp_rank))
        owned = numel // layout.num_shards
        with silent_world(layout.mesh.size, rank):
            found = state_bytes(trainee_of(layout, rank).optimizer)
        assert found == {"weights": (owned if choice["zero"] == 3 else numel) * layout.element_bytes,
                         "gradients": (owned if choice["zero"] >= 2 else numel) * layout.main_bytes,
                         "master": 4 * owned if precision == "bf16" else 0, "moments": 2 * owned * layout.main_bytes}
        foretold = make_plan(layout.job).memory[at.pp_rank]
        assert found == {state: getattr(foretold, state) for state in STATES}


@pytest.mark.parametrize("choice", all_pairs()[::6], ids=name_of)
def test_a_rank_played_alone_makes_the_calls_foretold(choice, monkeypatch):
    calls: list[Call] = []

    def spy(name, op, group_of=lambda group: "everyone" if group == "default_pg" else group):
        original = getattr(SilentGroup, name)

        def recorded(self, *args):
            whole = {"all_reduce": lambda: args[0][0], "send": lambda: args[0][0], "receive": lambda: args[0][0],
                     "all_gather": lambda: args[0], "reduce_scatter": lambda: args[1]}[op]()
            peer = args[1] if op in ("send", "receive") else None
            calls.append(Call(op, group_of(self.getGroupDesc()), whole.nbytes, peer))
            return original(self, *args)

        monkeypatch.setattr(SilentGroup, name, recorded)

    for name, op in (("allreduce", "all_reduce"), ("send", "send"), ("recv", "receive"),
                     ("_allgather_base", "all_gather"), ("all_gather_single", "all_gather"),
                     ("_reduce_scatter_base", "reduce_scatter"), ("reduce_scatter_single", "reduce_scatter")):
        spy(name, op)
    layout = Layout(job_of(choice))
    num = choice["accumulation"]
    for rank in {0, layout.mesh.size - 1}:
        traffic = Traffic(layout, layout.mesh.coordinates(rank))
        with silent_world(layout.mesh.size, rank):
            trainee = trainee_of(layout, rank)
            calls.clear()
            batch = range(num * layout.mesh.dp_size)
            compute_gradients(trainee, Progress(), random_tokens(choice["vocab"], 8), batch, 1.0)
            trainee.optimizer.update(0.1, 0, 1.0)
        foretold = [c for c in traffic.step(layout.program(traffic.at.pp_rank, num)) if c.group != "everyone"]
        assert sorted(calls, key=str) == sorted(foretold, key=str)
        for group in ("tp", "dp", "pp_forward", "pp_backward"):
            assert [c for c in calls if c.group == group] == [c for c in foretold if c.group == group]


@pytest.mark.parametrize("recompute", ["none", "selective", "full", "offload"])
def test_shapes_take_the_memory_that_tensors_take(recompute):
    layout = Layout(job_of({**PLAIN, "mesh": (2, 2, 2), "recompute": recompute}, "bf16"))
    for rank in (0, 7):
        shapes, tensors = (rehearse(layout, rank, CPU, real) for real in (False, True))
        assert shapes.memory_bytes == tensors.memory_bytes
        assert shapes.flops == tensors.flops > 0
        assert shapes.compute_s == 0 < tensors.compute_s
        assert "a microbatch" in describe(layout, tensors) and "on shapes only" in describe(layout, shapes)


def test_the_ledger_counts_what_lives():
    ledger = Ledger()
    with ledger:
        a = torch.zeros(1000, dtype=torch.float32)
        ledger.begin("next")
        b = a.view(10, 100)[2:4] + 0  # a new storage of 200 elements
        del a
    assert (ledger.held, ledger.peak, ledger.peak_before) == (800, 4800, 4000)
    del b
    assert ledger.held == 0


def test_activations_grow_with_what_is_in_flight():
    """1F1B: stage i of p keeps p - i microbatches; one more message may be under way."""
    def activations(schedule, batch):
        job = override(job_of({**PLAIN, "mesh": (1, 4, 1), "schedule": schedule}), train={"global_batch": batch})
        return rehearse(Layout(resolve(job)), 0, CPU, False).memory_bytes["activations"]

    assert activations("1f1b", 16) == activations("1f1b", 32)
    assert activations("gpipe", 32) == pytest.approx(2 * activations("gpipe", 16), rel=0.1)


def test_few_microbatches_fill_a_stage():
    layout = Layout(resolve(override(job_of({**PLAIN, "mesh": (1, 4, 1)}), train={"global_batch": 64})))
    assert [steady_microbatches(layout, stage) for stage in range(4)] == [5, 4, 3, 2]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_peak_of_sharded_training_is_foretold(zero):
    job = resolve(override(Job(), model={"layers": 6, "hidden": 512, "heads": 8, "seq": 512, "vocab": 8192}, layout={
        "dp": 8, "zero": zero}, train={"global_batch": 16, "microbatch": 1, "precision": "bf16", "compile": False}))
    foretold = make_plan(job).memory[0]
    seen = rehearse(Layout(job), 3, CPU, real=False).peak_bytes
    assert foretold.total - foretold.fragmentation == pytest.approx(seen, rel=0.1)


@pytest.mark.parametrize("recompute", ["none", "selective", "full", "offload"])
@pytest.mark.parametrize("model", [
    {"kind": "gpt"}, {"kind": "llama", "tied": False}, {"kind": "llama", "kv_heads": 2},
], ids=str)
def test_arithmetic_equals_the_formula(model, recompute):
    """Forward once, backward twice; full recomputation repeats the layer, selective attention and its projections.

    torch also counts the scores that fused attention computes again in its backward: half of its forward.
    """
    batch, hidden, ffn, layers, seq, vocab = 2, 256, 768, 3, 64, 512
    job = resolve(override(Job(), model={"layers": layers, "hidden": hidden, "heads": 8, "ffn": ffn, "seq": seq,
                                         "vocab": vocab, **model},
                           layout={"recompute": recompute}, train={"global_batch": batch, "microbatch": batch}))
    kv_width = hidden // 8 * job.model.kv_heads
    tokens = batch * seq
    scores = 4 * tokens * seq * hidden
    attention = 2 * tokens * hidden * (hidden + 2 * kv_width) + scores
    out = 2 * tokens * hidden * hidden
    mlp = 2 * tokens * hidden * ffn * (2 if job.model.kind == "gpt" else 3)
    again = {"none": 0, "offload": 0, "selective": attention + out, "full": attention + out + mlp}[recompute]
    expected = layers * (3 * (attention + out + mlp) + scores / 2 + again) + 3 * 2 * tokens * hidden * vocab
    found = rehearse(Layout(job), 0, CPU, False).flops
    assert found == expected
    # the planner counts the mathematics, and so not the scores computed again
    assert make_plan(job).hardware_flops == pytest.approx(found, rel=0.01)


def test_commands(capsys):
    assert main(["rehearse", "jobs/yuan-245b.toml", "--rank", "2127", "--train.global_batch", "70"]) == 0
    told = capsys.readouterr().out
    assert "rank 2127 of 2128 (pp 37 dp 6 cp 0 tp 7): 2 layers of 76, 2 of 10 microbatches played" in told
    assert main(["rehearse", "jobs/yuan-245b.toml", "--all", "--train.global_batch", "70"]) == 0
    assert capsys.readouterr().out.startswith("2,128 ranks in 683 groups: ")
    assert main(["rehearse", "jobs/demo.toml", "--rank", "4"]) == 2
    assert "--rank: 4 is not among the 4 ranks; give 0 to 3" in capsys.readouterr().err
