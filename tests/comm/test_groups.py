"""Every rank's groups for worlds that no test machine has: torch's fake backend carries no data but takes the calls."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from hpcpar.comm.bootstrap import check_gpus
from hpcpar.comm.groups import open_groups
from hpcpar.errors import UserError
from hpcpar.layout.mesh import Mesh


@pytest.fixture
def fake_world():
    def start(size, rank):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    yield start
    dist.destroy_process_group()


@pytest.mark.parametrize("mesh, rank", [(Mesh(2, 2, 1, 2), r) for r in range(8)]
                         + [(Mesh(38, 7, 1, 8), r) for r in (0, 7, 1777, 2127)]
                         + [(Mesh(4, 16, 1, 8, dp_inner=4), r) for r in (0, 200, 511)], ids=str)
def test_a_rank_opens_only_its_own_groups(fake_world, mesh, rank, monkeypatch):
    fake_world(mesh.size, rank)
    made = []
    original = dist.new_group

    def spy(ranks, **settings):
        assert settings["use_local_synchronization"]
        made.append((settings["group_desc"], tuple(ranks)))
        return original(ranks, **settings)

    monkeypatch.setattr(dist, "new_group", spy)
    groups = open_groups(mesh, rank)
    assert groups.everyone is dist.group.WORLD
    assert len(made) + 1 <= 6 and all(rank in ranks for _, ranks in made)
    hybrid = ["dp_across"] if mesh.dp_inner else []
    assert [name for name, _ in made] == ["tp", "dp", *hybrid, "pp_forward", "pp_backward"]
    for name, ranks in made:
        axis = name[:2]
        assert ranks == mesh.members(name, rank)
        opened = getattr(groups, name)
        assert dist.get_world_size(opened) == len(ranks)
        place = getattr(groups.at, f"{axis}_rank")
        if mesh.dp_inner and axis == "dp":
            place = place % 4 if name == "dp" else place // 4
        assert dist.get_group_rank(opened, rank) == place
    groups.close()


def test_axes_of_size_one_open_nothing(fake_world, monkeypatch):
    fake_world(8, 3)
    monkeypatch.setattr(dist, "new_group", lambda *a, **k: pytest.fail("a group of one rank"))
    groups = open_groups(Mesh(1, 1, 1, 1), 0)
    assert groups.opened == []


@pytest.mark.parametrize("mesh", [Mesh(2, 2, 1, 2), Mesh(38, 7, 1, 8)], ids=str)
def test_every_rank_makes_the_calls_that_its_peers_make(mesh):
    """A group exists once for all its members, in the same order of ranks."""
    for axis in ("pp", "dp", "tp"):
        groups = {mesh.group(axis, rank) for rank in range(mesh.size)}
        assert sorted(r for g in groups for r in g) == list(range(mesh.size))
        assert all(mesh.group(axis, rank) == group for group in groups for rank in group)


def test_gpus_that_cannot_go_together_are_told_before_nccl_hangs():
    good = [("n1", "a"), ("n1", "b"), ("n2", "a")]
    check_gpus([("n1", ""), ("n2", "")])
    check_gpus(good)
    with pytest.raises(UserError, match=r"ranks 1 and 3 have the same GPU on n1.*HPCPAR_SHARE_GPUS=1"):
        check_gpus([*good, ("n1", "b")])
    check_gpus([*good, ("n1", "b")], shared=True)
    for shared in (False, True):
        with pytest.raises(UserError, match="rank 3 finds no GPU on n3, others have one"):
            check_gpus([*good, ("n3", "")], shared)
