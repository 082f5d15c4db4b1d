"""Collectives in shared memory: long messages, memory that the group shares, several in flight, and no room for any."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hpcpar.comm import mpi_memory
from hpcpar.comm.collectives import (
    all_gather_sequence,
    gather_flat,
    lent,
    reduce_scatter_flat,
    reduce_scatter_sequence,
    shared_zeros,
    zeros_of,
)

pytestmark = pytest.mark.mpi

CPU = torch.device("cpu")


@pytest.fixture
def group(world: SimpleNamespace) -> Iterator[dist.ProcessGroup]:
    """All ranks, with memory of its own."""
    made = dist.new_group(use_local_synchronization=True)
    yield made
    dist.destroy_process_group(made)


@pytest.fixture(params=["room", "no room"])
def any_group(world: SimpleNamespace, request: pytest.FixtureRequest,
              monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.ProcessGroup]:
    """All ranks, once in a host's memory and once where that is full, so that MPI carries everything."""
    if request.param == "no room":
        monkeypatch.setattr(mpi_memory, "_FOLDER", Path("/nowhere"))
    made = dist.new_group(use_local_synchronization=True)
    yield made
    dist.destroy_process_group(made)


def of_rank(rank: int, numel: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Whole numbers, so that no order of summation matters."""
    return torch.randint(0, 9, (numel,), generator=torch.Generator().manual_seed(rank)).to(dtype)


@pytest.mark.parametrize("numel", [0, 1, 7, 2048, 1 << 19, (1 << 19) + 3, 3 << 19])  # up to three slots of a rank
def test_any_length(world: SimpleNamespace, any_group: dist.ProcessGroup, numel: int) -> None:
    everyones = torch.stack([of_rank(rank, numel) for rank in range(world.size)])
    mine = of_rank(world.rank, numel)
    summed = mine.clone()
    dist.all_reduce(summed, group=any_group)
    assert summed.equal(everyones.sum(0))
    gathered = torch.empty(world.size * numel, dtype=mine.dtype)
    gather_flat(gathered, mine, any_group)
    assert gathered.equal(everyones.flatten())
    told = mine.clone()
    dist.broadcast(told, group_src=3, group=any_group)
    assert told.equal(everyones[3])
    part = torch.empty(numel, dtype=mine.dtype)
    reduce_scatter_flat(part, gathered * (world.rank + 1), any_group)
    assert part.equal(everyones[world.rank] * sum(range(1, world.size + 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_that_the_group_shares(world: SimpleNamespace, any_group: dist.ProcessGroup,
                                      dtype: torch.dtype) -> None:
    numel, rank = 8 * 70000, world.rank
    grads = zeros_of(any_group, numel, dtype, CPU)
    weights = shared_zeros(any_group, numel, dtype, CPU, common=True)
    if weights is None:  # a group without such memory gathers into its own
        weights = torch.zeros(numel, dtype=dtype)
    assert not grads.any() and not weights.any()
    own = slice(rank * numel // 8, (rank + 1) * numel // 8)
    for step in range(3):
        grads.copy_(of_rank(10 * step + rank, numel, dtype))
        reduce_scatter_flat(grads[own], grads, any_group)
        want = torch.stack([of_rank(10 * step + other, numel, torch.float32) for other in range(world.size)]).sum(0)
        assert grads[own].float().equal(want[own])
        dist.barrier(any_group)  # nobody writes the weights that another still compares
        weights[own] = grads[own]
        gather_flat(weights, weights[own], any_group)
        assert weights.float().equal(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_gathered_and_summed(world: SimpleNamespace, any_group: dist.ProcessGroup,
                                        dtype: torch.dtype) -> None:
    batch, part, hidden = 2, 3, 4096
    everyones = [of_rank(rank, batch * part * hidden, dtype).view(batch, part, hidden) for rank in range(world.size)]
    gathered = all_gather_sequence(everyones[world.rank], any_group)
    assert gathered.equal(torch.cat(everyones))
    own = reduce_scatter_sequence(gathered, any_group)  # of what the group shares, in no rank's own part
    assert own.equal(everyones[world.rank] * world.size)
    sums = lent(gathered.shape, gathered, any_group)
    sums = torch.empty_like(gathered) if sums is None else sums
    own = reduce_scatter_sequence(sums.copy_(gathered), any_group)
    assert own.equal(everyones[world.rank] * world.size)


def test_shared_memory_is_shared(world: SimpleNamespace, group: dist.ProcessGroup) -> None:
    common = shared_zeros(group, world.size, torch.int64, CPU, common=True)
    assert common is not None
    common[world.rank] = world.rank + 1
    dist.barrier(group)
    assert common.tolist() == list(range(1, world.size + 1))
    own = zeros_of(group, world.size, torch.int64, CPU)
    own[world.rank] = 1
    dist.barrier(group)
    assert own.sum() == 1


@pytest.mark.parametrize("seed", range(4))
def test_lent_memory_is_not_lent_again_while_a_rank_holds_it(world: SimpleNamespace, group: dist.ProcessGroup,
                                                             seed: int) -> None:
    """Ranks let go of what they gathered and summed whenever they like, each in its own time."""
    own_time = random.Random(f"{seed} {world.rank}")
    held: list[tuple[int, Tensor]] = []
    for number in range(40):
        numel = 4096 * (1 + number % 3)
        gathered = lent((world.size, numel), torch.empty(0), group, common=True)
        summed = lent((world.size, numel), torch.empty(0), group)
        assert gathered is not None and summed is not None
        mine = gathered[world.rank].fill_(number * world.size + world.rank)
        gather_flat(gathered, mine, group)
        held.append((number, gathered))
        summed.copy_(gathered)
        total = torch.empty(numel)
        reduce_scatter_flat(total, summed, group)
        assert total.unique().tolist() == [world.size * (number * world.size + world.rank)]
        own_time.shuffle(held)
        for _ in range(own_time.randrange(3)):
            if held:
                _expect_gathered(world.size, *held.pop())
        del gathered, summed, mine
    for each in held:
        _expect_gathered(world.size, *each)


def _expect_gathered(size: int, number: int, gathered: Tensor) -> None:
    assert [row.unique().tolist() for row in gathered] == [[number * size + rank] for rank in range(size)]


def test_lent_memory_comes_back(world: SimpleNamespace, group: dist.ProcessGroup) -> None:
    addresses = set()
    for _ in range(9):
        gathered = all_gather_sequence(torch.ones(1, 2, 4096), group)
        assert gathered.shape == (world.size, 2, 4096) and gathered.eq(1).all()
        addresses.add(gathered.data_ptr())
        del gathered
        dist.barrier(group)
    assert len(addresses) <= 2  # the one lent next is chosen from those free a turn ago


def test_memory_is_lent_alike_while_collectives_are_under_way(world: SimpleNamespace,
                                                              group: dist.ProcessGroup) -> None:
    """Some ranks see at once that a sum is over, some only when they lend."""
    for number in range(30):
        first = lent((world.size, 600), torch.empty(0), group)
        assert first is not None
        first.fill_(number)
        part = torch.empty(600)
        work = reduce_scatter_flat(part, first, group, async_op=True)
        assert work is not None
        if (number + world.rank) % 3 == 0:
            work.wait()
        del first
        second = lent((world.size, 600), torch.empty(0), group, common=True)
        assert second is not None
        gather_flat(second, second[world.rank].fill_(number + world.rank), group)
        assert second[:, 0].tolist() == [number + rank for rank in range(world.size)]
        work.wait()
        assert part.unique().tolist() == [number * world.size]


def test_memory_runs_out_while_some_is_lent(world: SimpleNamespace, group: dist.ProcessGroup,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    held = [all_gather_sequence(torch.full((1, 1, 4096), 8.0 * number + world.rank), group) for number in range(3)]
    if world.rank == 0:  # who makes the files
        monkeypatch.setattr(mpi_memory.os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=1, f_blocks=9))
    held += [all_gather_sequence(torch.full((1, 1, 4096), 8.0 * number + world.rank), group) for number in range(3, 9)]
    for number, gathered in enumerate(held):
        assert gathered[:, 0, 0].tolist() == [8 * number + rank for rank in range(world.size)]


def test_lent_memory_outlives_its_group(world: SimpleNamespace) -> None:
    made = dist.new_group(use_local_synchronization=True)
    gathered = all_gather_sequence(torch.full((1, 1, 4096), float(world.rank)), made)
    dist.destroy_process_group(made)
    gc.collect()
    assert gathered[:, 0, 0].tolist() == [*range(world.size)]


def test_a_rank_can_hold_more_than_there_are_blocks(world: SimpleNamespace, group: dist.ProcessGroup) -> None:
    held = [all_gather_sequence(torch.full((1, 1, 4096), 8.0 * number + world.rank), group) for number in range(70)]
    for number, gathered in enumerate(held):
        assert gathered[:, 0, 0].tolist() == [8 * number + rank for rank in range(world.size)]


def test_many_in_flight_are_waited_for_in_any_order(world: SimpleNamespace, group: dist.ProcessGroup) -> None:
    numel = 8 * 5000
    buckets = [zeros_of(group, numel, torch.float64, CPU) for _ in range(4)]
    for number, bucket in enumerate(buckets):
        bucket.fill_(world.rank + number)
    own = slice(world.rank * numel // 8, (world.rank + 1) * numel // 8)
    works = [reduce_scatter_flat(bucket[own], bucket, group, async_op=True) for bucket in buckets]
    plain = torch.full((100000,), float(world.rank))
    works.append(dist.all_reduce(plain, group=group, async_op=True))
    for work in reversed(works):
        assert work is not None
        work.wait()
    total = sum(range(world.size))
    assert [bucket[own].unique().item() for bucket in buckets] == [total + number * world.size for number in range(4)]
    assert plain.unique().item() == total


def test_a_wait_elsewhere_carries_on_what_others_wait_for(world: SimpleNamespace, group: dist.ProcessGroup) -> None:
    """Rank 0 waits for a sum first, the others for its message first, which it sends after the sum."""
    shared = zeros_of(group, 8, torch.float64, CPU)
    shared.fill_(1.0)
    own = shared[world.rank:world.rank + 1]
    work = reduce_scatter_flat(own, shared, group, async_op=True)
    assert work is not None
    message = torch.zeros(1)
    if world.rank == 0:
        work.wait()  # over when all have read rank 0's part: the others do that while they wait for the message
        for peer in range(1, world.size):
            dist.send(torch.ones(1), peer)
    else:
        dist.recv(message, 0)
        work.wait()
        assert message.item() == 1
    assert own.item() == world.size


def test_nothing_is_left_in_the_folder(world: SimpleNamespace, group: dist.ProcessGroup) -> None:
    zeros_of(group, 1000, torch.float32, CPU)
    dist.all_reduce(torch.ones(100000), group=group)
    dist.barrier(group)
    gc.collect()  # no mapping goes while they are listed
    mine = {f.rsplit("/", 1)[-1] for f in map(os.readlink, _links()) if "mpi4py-backend" in f and "deleted" not in f}
    assert not mine


def _links() -> list[Path]:
    return list(Path("/proc/self/map_files").iterdir())
