from __future__ import annotations

import random

import numpy as np
import pytest

from hpcpar.layout.boxes import Box, flat_range_boxes, shard_units, whole


def random_box(draw: random.Random, shape: tuple[int, ...]) -> Box:
    offset = tuple(draw.randrange(n) for n in shape)
    return Box(offset, tuple(draw.randint(1, n - o) for n, o in zip(shape, offset, strict=True)))


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_flat_ranges_hold_the_elements_that_numpy_says(dims: int) -> None:
    draw = random.Random(dims)
    for _ in range(200):
        shape = tuple(draw.randint(1, 5) for _ in range(dims))
        box = random_box(draw, shape)
        start, stop = sorted(draw.choices(range(box.numel + 1), k=2))
        tensor = np.arange(np.prod(shape)).reshape(shape)
        parts = flat_range_boxes(box, start, stop)
        flat = tensor[box.slices()].ravel()
        expected = start
        for at, part in parts:
            assert at == expected
            assert part.intersect(box) == part
            np.testing.assert_array_equal(tensor[part.slices()].ravel(), flat[at:at + part.numel])
            expected += part.numel
        assert expected == stop or (start == stop and not parts)
        assert len(parts) <= 2 * dims - 1


def test_an_empty_or_reversed_range_holds_nothing() -> None:
    assert flat_range_boxes(whole((2, 3)), 4, 4) == [] == flat_range_boxes(whole((2, 3)), 5, 2)


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_intersections_are_the_elements_in_both(dims: int) -> None:
    draw = random.Random(dims)
    met = 0
    for _ in range(200):
        shape = tuple(draw.randint(1, 6) for _ in range(dims))
        a, b = random_box(draw, shape), random_box(draw, shape)
        common = np.zeros((2, *shape), bool)
        common[0][a.slices()] = common[1][b.slices()] = True
        found = a.intersect(b)
        assert found == b.intersect(a)
        drawn = np.zeros(shape, bool)
        if found is not None:
            met += 1
            drawn[found.slices()] = True
            assert found.numel == drawn.sum()
            inside = np.zeros(a.size, bool)
            inside[found.slices(within=a)] = True
            np.testing.assert_array_equal(inside, common[1][a.slices()])
        np.testing.assert_array_equal(drawn, common.all(axis=0))
    assert 10 < met < 200


@pytest.mark.parametrize("units", [1, 2, 7, 12, 53228])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 8])
def test_shards_of_units_are_even_and_cover_all(units: int, num_shards: int) -> None:
    shards = [shard_units(units, num_shards, i) for i in range(num_shards)]
    held = [u for first, count in shards for u in range(first, first + count)]
    counts = [count for _, count in shards]
    if units >= num_shards:
        assert held == list(range(units))
        assert max(counts) - min(counts) <= 1
    else:
        assert counts == [1] * num_shards and held == sorted(held) and set(held) == set(range(units))
