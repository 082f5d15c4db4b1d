"""Later stages go first where ranks share cores, if they are later."""

from __future__ import annotations

import pytest

from hpcpar.layout.precedence import nice_levels
from hpcpar.layout.schedule import place_chunks


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "zero-bubble"])
def test_the_last_stage_gives_way_to_none_and_the_first_to_all(name: str) -> None:
    assert nice_levels(place_chunks(name, 8)) == [7, 6, 5, 4, 3, 2, 1, 0]
    assert nice_levels(place_chunks(name, 2)) == [7, 0]
    many = nice_levels(place_chunks(name, 40))
    assert many == sorted(many, reverse=True) and (many[0], many[-1]) == (7, 0)


@pytest.mark.parametrize(("name", "chunks"), [("interleaved", 2), ("breadth-first", 3), ("zbv", 2), ("dualpipev", 2)])
def test_in_loops_and_vs_no_rank_is_later_than_another(name: str, chunks: int) -> None:
    assert nice_levels(place_chunks(name, 4, chunks)) == [0, 0, 0, 0]


def test_without_a_pipeline_nobody_gives_way() -> None:
    assert nice_levels((0,)) == nice_levels((0, 0)) == [0]
