"""A wish made complete, or refused with field, rule and nearest fix."""

from __future__ import annotations

import dataclasses
import math
import random
import re
import typing
from typing import Any

import numpy as np
import pytest

from hpcpar.config.job import Job
from hpcpar.config.load import job_from_tables, to_toml
from hpcpar.config.resolve import nearest, resolve
from hpcpar.errors import UserError
from hpcpar.layout.layout import Layout
from hpcpar.layout.schedule import ORDERS, check_programs, check_schedule

SMALL: dict[str, dict[str, Any]] = {
    "model": {"layers": 4, "hidden": 48, "heads": 12, "seq": 8, "vocab": 64},
    "train": {"global_batch": 8},
}
NAMES = {f"{t}.{f.name}" for t, s in typing.get_type_hints(Job).items() for f in dataclasses.fields(s)}


def wish(**tables: dict[str, Any]) -> Job:
    return job_from_tables({name: {**SMALL.get(name, {}), **tables.get(name, {})} for name in {*SMALL, *tables}})


def refused(job: Job, world_size: int | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        resolve(job, world_size)
    return caught.value


def test_derived_values_are_filled_in() -> None:
    job = resolve(wish(layout={"tp": 2, "pp": 2}, train={"steps": 7}), 8)
    assert (job.layout.dp, job.model.kv_heads, job.model.ffn, job.optim.decay_steps) == (2, 12, 192, 7)
    assert (job.world_size, job.head_dim) == (8, 4)


@pytest.mark.parametrize(("hidden", "ffn"), [(48, 128), (4096, 10944), (384, 1024), (24, 64)])
def test_llama_ffn_is_two_thirds_of_four_hidden_rounded_up_to_64(hidden: int, ffn: int) -> None:
    assert resolve(wish(model={"kind": "llama", "hidden": hidden, "heads": 4})).model.ffn == ffn


@pytest.mark.parametrize(("tables", "world_size", "dp"), [
    ({}, None, 1),
    ({}, 8, 8),
    ({"layout": {"tp": 2}}, None, 1),
    ({"machine": {"gpu": "A100", "nodes": 2, "gpus_per_node": 4}, "layout": {"tp": 2}}, None, 4),
    ({"layout": {"dp": 4}}, None, 4),
    ({"layout": {"dp": 4}}, 4, 4),
])
def test_dp_is_what_is_left(tables: dict[str, Any], world_size: int | None, dp: int) -> None:
    assert resolve(wish(**tables), world_size).layout.dp == dp


@pytest.mark.parametrize("world_size", [None, 4])
def test_resolving_again_changes_nothing(world_size: int | None) -> None:
    job = resolve(wish(layout={"tp": 2}, model={"kind": "llama", "kv_heads": 6}), world_size)
    assert resolve(job, job.world_size) == job == resolve(job)
    assert "kv_heads = 6" in to_toml(job)


@pytest.mark.parametrize(("wanted", "legal", "said"), [
    (3, [1, 2, 4, 8], "2 or 4"), (9, [1, 2, 4], "4"), (0, [1, 2], "1"), (5, [4, 6], "4 or 6"),
])
def test_nearest_names_the_neighbours(wanted: int, legal: list[int], said: str) -> None:
    assert nearest(wanted, legal) == f"nearest legal: {said}"


@pytest.mark.parametrize(("tables", "message"), [
    ({"layout": {"tp": 5}},
     "layout.tp: 5 must divide model.heads = 12 and model.ffn = 192; nearest legal: 4 or 6"),
    ({"layout": {"tp": 100}}, "layout.tp: 100 must divide model.heads = 12 and model.ffn = 192; nearest legal: 12"),
    ({"layout": {"tp": 12}, "model": {"kv_heads": 4, "ffn": 60, "seq": 24}}, None),
    ({"layout": {"tp": 6}, "model": {"kv_heads": 4}},
     "layout.tp: 6 must divide model.heads = 12 and model.ffn = 192, and divide model.kv_heads = 4 or be a multiple "
     "of it; nearest legal: 4 or 12"),
    ({"layout": {"tp": 2}, "model": {"ffn": 63}},
     "layout.tp: 2 must divide model.heads = 12 and model.ffn = 63; nearest legal: 1 or 3"),
    ({"model": {"heads": 7}}, "model.heads: 7 does not divide model.hidden = 48; nearest legal: 6 or 8"),
    ({"model": {"kv_heads": 5}}, "model.kv_heads: 5 does not divide model.heads = 12; nearest legal: 4 or 6"),
    ({"model": {"kv_heads": 24}}, "model.kv_heads: 24 does not divide model.heads = 12; nearest legal: 12"),
    ({"model": {"kind": "llama", "heads": 16}},
     "model.heads: rotary positions need an even head_dim, not 3; nearest legal: 12 or 24"),
    ({"model": {"kind": "llama", "hidden": 45, "heads": 9}},
     "model.heads: rotary positions need an even head_dim, not 5; choose an even model.hidden"),
    ({"model": {"kind": "llama", "heads": 1}}, None),
    ({"model": {"dropout": 1.0}}, "model.dropout: is 1.0, must be below 1; write 0.1"),
    ({"model": {"vocab": 3}, "layout": {"tp": 4}},
     "model.vocab: 3 is fewer rows than layout.tp = 4; write vocab = 4 or more"),
    ({"layout": {"pp": 5}},
     "layout.pp: 5 stages for model.layers = 4: every stage needs a layer; nearest legal: 4"),
    ({"layout": {"tp": 2}, "model": {"seq": 9}},
     "model.seq: sequence parallelism needs seq divisible by layout.tp = 2, not 9; write seq = 8, or "
     "--layout.sequence_parallel false"),
    ({"layout": {"tp": 2, "sequence_parallel": False}, "model": {"seq": 9}}, None),
    ({"model": {"seq": 9}}, None),
    ({"layout": {"tp": 2, "tp_overlap": 2, "sequence_parallel": False}},
     "layout.tp_overlap: is 2, but without sequence parallelism an exchange cannot be cut into pieces; write "
     "sequence_parallel = true, or tp_overlap = 1"),
    ({"layout": {"tp": 2, "tp_overlap": 4}, "model": {"seq": 12}},
     "layout.tp_overlap: 4 pieces of a rank's 6 tokens are not equally long; nearest legal: 3 or 6"),
    ({"layout": {"tp": 2, "tp_overlap": 3}, "model": {"seq": 12}}, None),
    ({"layout": {"tp": 1, "tp_overlap": 5, "sequence_parallel": False}, "model": {"seq": 12}}, None),
    ({"layout": {"cp": 2}}, "layout.cp: is 2, but this version only runs cp = 1; write cp = 1"),
    ({"layout": {"zero": [3, 3], "dp": 8}}, "layout.zero: [3, 3] shards over 3 of layout.dp = 8 ranks: must be 2 or "
                                            "more and divide dp; nearest legal: 2 or 4"),
    ({"layout": {"zero": [1, 2], "dp": 1}}, "layout.zero: [1, 2] shards over 2 of layout.dp = 1 ranks: must be 2 or "
                                            "more and divide dp; write zero = 0"),
    ({"layout": {"zero": [2, 8], "dp": 8}}, None),
    ({"layout": {"ep": 2}}, "layout.ep: is 2, but this version only runs ep = 1; write ep = 1"),
    ({"layout": {"chunks": 2}}, "layout.chunks: is 2, but 1f1b has 1 a rank; write chunks = 1"),
    ({"layout": {"schedule": "zbv", "pp": 2}}, "layout.chunks: is 1, but zbv has 2 a rank; write chunks = 2"),
    ({"layout": {"schedule": "interleaved", "pp": 2}},
     "layout.chunks: is 1, but interleaved has 2 or more a rank; write chunks = 2"),
    ({"layout": {"schedule": "interleaved", "pp": 2, "chunks": 3}},
     "layout.chunks: 3 x layout.pp = 2 chunks for model.layers = 4: every chunk needs a layer; nearest legal: 2"),
    ({"layout": {"schedule": "interleaved", "pp": 2, "chunks": 2}}, None),
    ({"layout": {"schedule": "interleaved", "pp": 2, "chunks": 2}, "train": {"global_batch": 7}},
     "train.global_batch: 7 must be a multiple of layout.dp x train.microbatch = 1 x 1 x layout.pp = 2 (chunks take "
     "microbatches in rounds of pp) = 2; nearest legal: 6 or 8"),
    ({"layout": {"schedule": "zero-bubble", "pp": 2, "chunks": 2}, "optim": {"ramp": [3, 1, 9]}},
     "optim.ramp: its start 3 must be a multiple of layout.dp x train.microbatch = 1 x 1 x layout.pp = 2 (chunks take "
     "microbatches in rounds of pp) = 2; nearest legal: 2 or 4"),
    ({"layout": {"schedule": "zero-bubble", "pp": 2}, "train": {"global_batch": 7}}, None),
    ({"layout": {"schedule": "dualpipev", "pp": 2, "chunks": 2}, "train": {"global_batch": 3}},
     "train.global_batch: 3 are fewer than the 2 x layout.pp = 4 microbatches a replica that dualpipev needs; nearest "
     "legal: 4"),
    ({"layout": {"schedule": "dualpipev", "pp": 2, "chunks": 2}, "optim": {"ramp": [2, 2, 9]}},
     "optim.ramp: starts with 2, fewer than dualpipev needs; nearest legal start: 4"),
    ({"layout": {"schedule": "zbv", "pp": 2, "chunks": 2}, "train": {"compile": True}},
     "train.compile: does not go with zbv, which splits backwards in two; write compile = false, or schedule = 1f1b"),
    ({"layout": {"schedule": "pipedream"}},
     'layout.schedule: "pipedream" computes gradients with old weights: it is on paper only, no rank plays it; choose '
     "another, and see it by hpcpar show JOB --schedule pipedream"),
    ({"layout": {"schedule": "table"}},
     "layout.table: is empty, but layout.schedule is table; give a file, or a line of actions for each pipeline rank"),
    ({"layout": {"table": ["0F0 0B0"]}},
     'layout.table: is given, but layout.schedule is 1f1b; write schedule = "table"'),
    ({"layout": {"schedule": "table", "table": "nowhere.csv"}},
     "layout.table: cannot read nowhere.csv: No such file or directory; give the path of a text file"),
    ({"layout": {"dp": 3}}, "train.global_batch: 8 must be a multiple of layout.dp x train.microbatch = 3 x 1 = 3; "
                            "nearest legal: 6 or 9"),
    ({"train": {"microbatch": 16}}, "train.global_batch: 8 must be a multiple of layout.dp x train.microbatch = "
                                    "1 x 16 = 16; nearest legal: 16"),
    ({"optim": {"ramp": [2, 2, 100]}}, None),
    ({"optim": {"ramp": [8, 8, 0]}}, None),
    ({"optim": {"ramp": [3, 2, 100]}}, "optim.ramp: [3, 2, 100] must go from start to global_batch = 8 in whole "
                                       "increments; for example [1, 1, 80]"),
    ({"optim": {"ramp": [16, 1, 100]}}, "optim.ramp: [16, 1, 100] must go from start to global_batch = 8 in whole "
                                        "increments; for example [1, 1, 80]"),
    ({"optim": {"ramp": [2, 0, 100]}}, "optim.ramp: [2, 0, 100] must go from start to global_batch = 8 in whole "
                                       "increments; for example [1, 1, 80]"),
    ({"optim": {"ramp": [2, 2, 100]}, "layout": {"dp": 4}},
     "optim.ramp: its start 2 must be a multiple of layout.dp x train.microbatch = 4 x 1 = 4; nearest legal: 4"),
    ({"optim": {"ramp": [4, 2, 100]}, "layout": {"dp": 4}},
     "optim.ramp: its increment 2 must be a multiple of layout.dp x train.microbatch = 4 x 1 = 4; nearest legal: 4"),
    ({"optim": {"betas": [0.9, 1.0]}}, "optim.betas: [0.9, 1.0] must lie in [0, 1); write [0.9, 0.95]"),
    ({"optim": {"lr": 1e-4, "min_lr": 1e-3}},
     "optim.min_lr: 0.001 is above optim.lr = 0.0001; write min_lr = 1e-05"),
    ({"data": {"validation": 1.0}}, "data.validation: is 1.0, must be below 1; write 0.01"),
    ({"checkpoint": {"ranks_per_file": 2}},
     "checkpoint.ranks_per_file: is 2, more than the 1 ranks; write 1"),
])
def test_what_is_refused_and_with_which_words(tables: dict[str, Any], message: str | None) -> None:
    job = wish(**tables)
    if message is None:
        assert resolve(job).model.layers == 4
    else:
        assert str(refused(job)) == message


@pytest.mark.parametrize(("layout", "world_size", "message"), [
    ({"tp": 2, "pp": 2, "dp": 2}, 4, "layout: tp 2 x pp 2 x dp 2 = 8, but 4 ranks were started; start 8 ranks "
                                     "(mpirun -n 8 ...), or give --layout.dp 1"),
    ({"tp": 2, "pp": 2}, 1, "layout: tp 2 x pp 2 x dp 1 = 4, but 1 rank was started; start 4 ranks "
                            "(mpirun -n 4 ...), or choose tp x pp of at most 1"),
    ({"tp": 2, "pp": 2}, 6, "layout: tp 2 x pp 2 x dp 1 = 4, but 6 ranks were started; start 4 ranks "
                            "(mpirun -n 4 ...), or a multiple of tp x pp = 4"),
])
def test_the_product_is_the_number_of_ranks(layout: dict[str, Any], world_size: int, message: str) -> None:
    assert str(refused(wish(layout=layout), world_size)) == message


@pytest.mark.parametrize(("hidden", "heads", "tp"), [(2048, 24, 1), (2048, 24, 8), (5140, 40, 8), (5140, 40, 1)])
def test_the_rows_of_gpt3s_table_that_cannot_be_are_refused(hidden: int, heads: int, tp: int) -> None:
    # table 2.1 of Brown et al. 2020 prints 24 heads of 128 for hidden 2048 (1.3B), and hidden 5140 for 40 heads (13B)
    job = wish(model={"layers": 24, "hidden": hidden, "heads": heads, "vocab": 50257, "seq": 2048}, layout={"tp": tp})
    error = refused(job)
    assert error.where == "model.heads"
    assert error.rule == f"{heads} does not divide model.hidden = {hidden}"
    for value in map(int, re.findall(r"\d+", error.fix)):
        assert hidden % value == 0


def test_a_slip_of_many_digits_is_refused_and_not_searched_for_minutes() -> None:
    assert refused(wish(model={"hidden": 10**12 + 1, "heads": 96})).where == "model.heads"


def random_tables(draw: random.Random) -> dict[str, dict[str, Any]]:
    """A configuration near the border of what is legal: about half are refused."""
    heads = draw.choice([1, 2, 3, 4, 6, 8])
    hidden = heads * draw.choice([2, 2, 3, 4]) + draw.choice([0, 0, 0, 0, 0, 0, 0, 1])
    tp, pp = draw.choice([1, 1, 1, 2, 2, 3, 4]), draw.choice([1, 1, 2, 3, 5])
    dp = draw.choice([1, 2, 3, None])
    microbatch = draw.choice([1, 2])
    batch = microbatch * (dp or 1) * draw.randint(1, 4) + draw.choice([0, 0, 0, 0, 0, 1])
    schedule, chunks = draw.choice([("1f1b", 1)] * 9 + [("1f1b", 2)] + [
        (name, 1 if name in ("gpipe", "1f1b") else 2) for name in ORDERS] + [("zero-bubble", 1), ("breadth-first", 3)])
    return {
        "model": {"kind": draw.choice(["gpt", "llama"]), "layers": draw.randint(1, 9), "hidden": hidden,
                  "heads": heads, "kv_heads": draw.choice([None, None, None, None, 1, 2, 4]),
                  "ffn": draw.choice([None, None, 12, 24, 25]), "seq": draw.choice([12, 12, 12, 7]),
                  "vocab": draw.choice([2, 13, 24, 51]),
                  "tied": draw.random() < 0.5},
        "layout": {"tp": tp, "pp": pp, "dp": dp, "zero": draw.choice([0, 1, 2, 3]),
                   "cp": draw.choice([1] * 30 + [2]), "schedule": schedule, "chunks": chunks,
                   "sequence_parallel": draw.random() < 0.5, "tp_overlap": draw.choice([1, 1, 2]),
                   "bucket_mib": draw.choice([0.001, 0.002, 1.0])},
        "train": {"global_batch": batch, "microbatch": microbatch},
        "optim": {"ramp": draw.choice([None] * 9 + [(microbatch, microbatch, 40)])},
    }


def check_layout(job: Job) -> None:
    layout = Layout(job)
    assert [number for chunk in layout.chunks for number in chunk] == list(range(job.model.layers))
    stored = {p.name: np.zeros(p.shape, np.int8) for p in layout.table}
    for rank in range(layout.mesh.size):
        for piece in layout.stored_pieces(rank):
            stored[piece.parameter.name][piece.box.slices()] += 1
    for name, times in stored.items():
        assert times.min() == times.max() == 1, name
    num = layout.num_microbatches
    check_schedule(layout.schedule(num))
    check_programs([layout.program(stage, num) for stage in range(layout.mesh.pp_size)])
    assert layout.schedule(num).num_microbatches == num


@pytest.mark.parametrize("seed", range(10))
def test_300_random_configurations_resolve_or_are_refused_by_field(seed: int) -> None:
    draw, accepted = random.Random(seed), 0
    for _ in range(300):
        tables = {t: {k: v for k, v in values.items() if v is not None} for t, values in random_tables(draw).items()}
        layout = {"dp": 1, **tables["layout"]}
        size = math.prod(layout[axis] for axis in ("tp", "pp", "dp", "cp")) + draw.choice([0] * 15 + [1])
        try:
            job = resolve(job_from_tables(tables), draw.choice([None, size]))
        except UserError as error:
            assert error.where in NAMES | {"layout"}
            assert error.rule and error.fix
            continue
        accepted += 1
        check_layout(job)
    assert 40 < accepted < 240
