from __future__ import annotations

import pytest

from hpcpar.layout.mesh import AXES, Coordinates, Mesh

MESHES = [Mesh(), Mesh(2, 3, 1, 4), Mesh(3, 1, 2, 2), Mesh(1, 7, 1, 1), Mesh(38, 7, 1, 8)]


@pytest.mark.parametrize("mesh", MESHES)
def test_rank_and_coordinates_are_each_others_inverse(mesh: Mesh) -> None:
    places = [mesh.coordinates(rank) for rank in range(mesh.size)]
    assert len(set(places)) == mesh.size
    assert [mesh.rank(at) for at in places] == list(range(mesh.size))
    assert all(0 <= i < size for at in places for i, size in zip(at, mesh.sizes, strict=True))


def test_tp_is_fastest_and_pp_slowest() -> None:
    mesh = Mesh(2, 3, 1, 4)
    assert mesh.coordinates(1) == Coordinates(0, 0, 0, 1)
    assert mesh.coordinates(4) == Coordinates(0, 1, 0, 0)
    assert mesh.coordinates(12) == Coordinates(1, 0, 0, 0)
    assert str(mesh.coordinates(17)) == "pp 1 dp 1 cp 0 tp 1"


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("axis", AXES)
def test_the_groups_of_an_axis_divide_the_ranks(mesh: Mesh, axis: str) -> None:
    groups = {mesh.group(axis, rank) for rank in range(mesh.size)}
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))
    index = AXES.index(axis)
    for group in groups:
        places = [mesh.coordinates(rank) for rank in group]
        assert [at[index] for at in places] == list(range(mesh.sizes[index]))
        assert len({at[:index] + at[index + 1:] for at in places}) == 1
