from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from hpcpar.config.load import job_from_tables
from hpcpar.config.resolve import resolve
from hpcpar.layout.buckets import owned_pieces
from hpcpar.layout.layout import Layout

CASES = [
    {"layout": {"tp": 1, "pp": 1, "dp": 3}},
    {"layout": {"tp": 2, "pp": 2, "dp": 2}},
    {"layout": {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": False}},
    {"layout": {"tp": 4, "pp": 3, "dp": 1, "zero": 0}, "model": {"kind": "llama", "kv_heads": 2}},
    {"layout": {"tp": 2, "pp": 2, "dp": 5, "bucket_mib": 100}, "model": {"tied": False}},
]


def make(tables: dict[str, dict[str, Any]]) -> Layout:
    model = {"layers": 3, "hidden": 24, "heads": 4, "seq": 8, "vocab": 53, "ffn": 40, **tables.get("model", {})}
    layout = {"bucket_mib": 0.002, **tables["layout"]}
    return Layout(resolve(job_from_tables({"model": model, "layout": layout, "train": {"global_batch": 30}})))


@pytest.mark.parametrize("tables", CASES)
def test_slots_lie_side_by_side_and_the_padding_divides(tables: dict[str, dict[str, Any]]) -> None:
    layout = make(tables)
    for stage in range(layout.mesh.pp_size):
        for tp_rank in range(layout.mesh.tp_size):
            buckets = layout.buckets(stage, tp_rank)
            held = [slot.parameter.name for bucket in buckets for slot in bucket.slots]
            assert sorted(held) == sorted(p.name for p in layout.parameters(stage))
            for bucket in buckets:
                end = 0
                for slot in bucket.slots:
                    assert slot.start == end
                    end += math.prod(slot.local_shape)
                assert end <= bucket.numel < end + 16 * layout.num_shards
                assert bucket.numel % (16 * layout.num_shards) == 0
                shards = [bucket.shard(layout.num_shards, i) for i in range(layout.num_shards)]
                assert (shards[0][0], shards[-1][1]) == (0, bucket.numel)
                assert all(a[1] == b[0] for a, b in pairwise(shards))


@pytest.mark.parametrize("tables", CASES)
def test_late_parameters_are_apart_and_equal_on_all_tp_ranks(tables: dict[str, dict[str, Any]]) -> None:
    layout = make(tables)
    for stage in range(layout.mesh.pp_size):
        per_rank = [layout.buckets(stage, tp_rank) for tp_rank in range(layout.mesh.tp_size)]
        for bucket in per_rank[0]:
            assert {layout.late(slot.parameter) for slot in bucket.slots} == {bucket.late}
        shapes = [[(b.numel, b.late, [(s.parameter.name, s.start) for s in b.slots]) for b in bs] for bs in per_rank]
        assert all(shape == shapes[0] for shape in shapes)


def test_what_is_late() -> None:
    def late(tables: dict[str, dict[str, Any]]) -> set[str]:
        layout = make(tables)
        return {p.name.split(".", 2)[-1] if p.layer is not None else p.name for p in layout.table if layout.late(p)}

    assert late(CASES[0]) == set()
    norms = {"attention_norm.weight", "attention_norm.bias", "mlp_norm.weight", "mlp_norm.bias", "final_norm.weight",
             "final_norm.bias"}
    replicated = norms | {"attention.out.bias", "mlp.down.bias", "embedding.position.weight"}
    assert late(CASES[1]) == replicated | {"embedding.token.weight"}
    assert late(CASES[2]) == {"embedding.token.weight"}
    assert late(CASES[4]) == replicated
    assert late(CASES[3]) == {n for n in norms if n.endswith("weight")} | {
        "attention.k.weight", "attention.v.weight", "embedding.token.weight"}


def test_a_tied_embedding_has_a_bucket_of_its_own_alike_on_both_stages() -> None:
    layout = make(CASES[1])
    first, last = ([b for b in layout.buckets(stage, 1) if b.slots[0].parameter.is_vocabulary] for stage in (0, 1))
    assert first == last
    assert len(first) == 1 and len(first[0].slots) == 1


def test_early_buckets_are_filled_to_about_the_limit_in_the_order_of_backward() -> None:
    layout = make({"layout": {"tp": 1, "pp": 1, "dp": 2}})
    limit = int(0.002 * 2**20 / 4)
    buckets = layout.buckets(0, 0)
    assert len(buckets) > 4
    for bucket in buckets[:-1]:
        assert sum(s.numel for s in bucket.slots) >= limit > sum(s.numel for s in bucket.slots[:-1])
    assert [s.parameter for b in buckets for s in b.slots] == list(reversed(layout.table))


@pytest.mark.parametrize("tables", CASES)
def test_owned_pieces_cover_every_local_element_once_at_its_flat_place(tables: dict[str, dict[str, Any]]) -> None:
    layout = make(tables)
    for stage, tp_rank in [(0, 0), (layout.mesh.pp_size - 1, layout.mesh.tp_size - 1)]:
        buckets = layout.buckets(stage, tp_rank)
        logical = {p.name: np.arange(p.numel).reshape(p.shape) for p in layout.table}
        flats = []
        for bucket in buckets:
            flat = np.full(bucket.numel, -1)
            for slot in bucket.slots:
                here = logical[slot.parameter.name][slot.box.slices()].ravel()
                flat[slot.start:slot.start + here.size] = here
            flats.append(flat)
        for index in range(layout.num_shards):
            shards = [flat[slice(*b.shard(layout.num_shards, index))] for flat, b in zip(flats, buckets, strict=True)]
            rest = [shard.copy() for shard in shards]
            for piece in owned_pieces(buckets, layout.num_shards, index):
                at = slice(piece.start, piece.start + piece.box.numel)
                want = logical[piece.parameter.name][piece.box.slices()].ravel()
                np.testing.assert_array_equal(shards[piece.bucket][at], want)
                assert (rest[piece.bucket][at] >= 0).all(), "owned twice"
                rest[piece.bucket][at] = -1
            assert all((shard == -1).all() for shard in rest)
