from __future__ import annotations

from itertools import pairwise

import pytest

from hpcpar.config.load import job_from_tables
from hpcpar.config.resolve import resolve
from hpcpar.layout.parameters import parameter_table
from hpcpar.layout.stages import chunk_parameters, split_layers


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_every_layer_is_on_one_stage_in_order_and_sizes_differ_by_at_most_one(num_stages: int) -> None:
    for num_layers in range(num_stages, 41):
        stages = split_layers(num_layers, tuple(range(num_stages)))
        assert len(stages) == num_stages
        assert [number for stage in stages for number in stage] == list(range(num_layers))
        assert max(map(len, stages)) - min(map(len, stages)) <= 1


def test_spare_layers_go_to_the_middle_first() -> None:
    assert [len(s) for s in split_layers(30, (0, 1, 2, 3))] == [7, 8, 8, 7]
    assert [len(s) for s in split_layers(7, (0, 1, 2, 3))] == [2, 2, 2, 1]
    assert [len(s) for s in split_layers(3, (0, 1))] == [2, 1]


@pytest.mark.parametrize("ranks", [(0, 1, 2, 0, 1, 2), (0, 1, 2, 2, 1, 0), (0, 1, 1, 0)], ids=str)
def test_ranks_share_the_layers_of_their_chunks_evenly(ranks: tuple[int, ...]) -> None:
    for num_layers in range(len(ranks), 30):
        chunks = split_layers(num_layers, ranks)
        assert [number for chunk in chunks for number in chunk] == list(range(num_layers))
        assert max(map(len, chunks)) - min(map(len, chunks)) <= 1
        load = [sum(len(c) for c, home in zip(chunks, ranks, strict=True) if home == rank) for rank in set(ranks)]
        assert max(load) - min(load) <= 1


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
def test_every_parameter_is_on_one_stage_but_a_tied_embedding_on_two(kind: str, tied: bool, num_stages: int) -> None:
    model = resolve(job_from_tables({"model": {"kind": kind, "tied": tied, "layers": 5}})).model
    table, stages = parameter_table(model), split_layers(5, tuple(range(num_stages)))
    held = [chunk_parameters(table, stages, stage, tied) for stage in range(num_stages)]
    for p in table:
        homes = [stage for stage, parameters in enumerate(held) if p in parameters]
        if p.name == "embedding.token.weight":
            assert homes == sorted({0, num_stages - 1} if tied else {0})
        elif p.name == "embedding.position.weight":
            assert homes == [0]
        elif p.layer is None:
            assert homes == [num_stages - 1]
        else:
            assert len(homes) == 1 and p.layer in stages[homes[0]]
    order = [p.name for p in table]
    for parameters in held:
        assert all(order.index(a.name) < order.index(b.name) for a, b in pairwise(parameters))
