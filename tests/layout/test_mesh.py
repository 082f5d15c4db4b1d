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


def test_a_hybrids_runs_are_neighbours_and_its_copies_lie_across() -> None:
    mesh = Mesh(2, 8, 1, 2, dp_inner=4)
    dp = mesh.group("dp", 19)
    assert dp == (17, 19, 21, 23, 25, 27, 29, 31)
    assert [mesh.members("dp", rank) for rank in (17, 23, 25)] == [dp[:4], dp[:4], dp[4:]]
    assert [mesh.members("dp_across", rank) for rank in (17, 19, 27)] == [dp[0::4], dp[1::4], dp[1::4]]
    whole = Mesh(2, 8, 1, 2)
    assert whole.members("dp", 19) == dp and whole.members("dp_across", 19) == (19,)
    for each in (mesh, whole):
        assert each.members("everyone", 3) == tuple(range(32)) and each.members("pp_forward", 0) == (0, 16)


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
