"""The MPI backend against plain arithmetic, gloo, and what PyTorch builds on process groups."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from hpcpar.comm import mpi_bells, mpi_outbox
from hpcpar.comm.mpi_backend import register
from hpcpar.comm.mpi_patience import Patience

pytestmark = pytest.mark.mpi

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]
Op = dist.ReduceOp


@pytest.fixture(scope="module")
def gloo(world: SimpleNamespace) -> Iterator[dist.ProcessGroup]:
    """The oracle: all ranks over gloo."""
    group = dist.new_group(backend="gloo")
    yield group
    dist.destroy_process_group(group)


@pytest.fixture(scope="module")
def half(world: SimpleNamespace) -> Iterator[dist.ProcessGroup]:
    """The ranks of this rank's parity, in a group that only they make."""
    ranks = list(range(world.rank % 2, world.size, 2))
    group = dist.new_group(ranks, use_local_synchronization=True)
    yield group
    dist.destroy_process_group(group)


def sample(rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers, exact in every dtype and order of summation."""
    values = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(rank))
    return values.to(dtype)


def strided(tensor: Tensor) -> Tensor:
    """The same values, not contiguous."""
    out = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)[..., 1]
    out.copy_(tensor)
    return out


LAYOUTS: list[Callable[[Tensor], Tensor]] = [torch.clone, strided]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
def test_reductions(world: SimpleNamespace, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    all_samples = torch.stack([sample(rank, (3, 5)) for rank in range(world.size)])
    expected = {Op.SUM: all_samples.sum(0), Op.MAX: all_samples.amax(0), Op.MIN: all_samples.amin(0)}
    expected[Op.PRODUCT] = all_samples.clamp(1, 2).prod(0)
    if dtype.is_floating_point:
        expected[Op.AVG] = all_samples.mean(0)
    for op, answer in expected.items():
        mine = sample(world.rank, (3, 5), dtype)
        tensor = layout(mine.clamp(1, 2) if op == Op.PRODUCT else mine)
        dist.all_reduce(tensor, op)
        torch.testing.assert_close(tensor, answer.to(dtype))
        rooted = layout(mine.clamp(1, 2) if op == Op.PRODUCT else mine)
        dist.reduce(rooted, world.size - 1, op)
        if world.rank == world.size - 1:
            torch.testing.assert_close(rooted, answer.to(dtype))


@pytest.mark.parametrize("messages", ["direct", "outbox", "full"])
def test_whatever_is_waited_for_is_rung(world: SimpleNamespace, messages: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is not woken sleeps a minute here; `full`: sends are over when they are received."""
    if messages != "direct":
        monkeypatch.setattr(mpi_bells, "_PROBE_S", 0.0)
    if messages == "full":
        monkeypatch.setattr(mpi_outbox, "_WAITING_BYTES", 0)
    register(f"mpi4py_rung_{messages}", patience=Patience(polls=1, longest_s=60, longest_rung_s=60))
    group: Any = dist.new_group(backend=f"mpi4py_rung_{messages}")
    bells = group._home.bells
    if bells is None:
        pytest.skip("no shared memory, or no sockets without a file")
    small, large, whole = torch.ones(8), torch.ones(1 << 20), group.shared(world.size << 12, torch.float32)
    own, after, before = torch.empty(1 << 12), (world.rank + 1) % world.size, (world.rank - 1) % world.size
    start = time.monotonic()
    for turn in range(30):
        time.sleep(0.001 * ((world.rank + turn) % world.size))  # another comes last each time
        dist.barrier(group)
        for tensor in (small, large):
            dist.all_reduce(tensor, Op.MAX, group)
        whole.fill_(1)
        dist.reduce_scatter_tensor(own, whole, group=group)
        assert own[0] == world.size
        for to, source in ((after, before), (before, after)) if group._home.mail or bells.direct else ():
            works = [dist.isend(large, to, group), dist.irecv(torch.empty_like(large), source, group)]
            for work in works:
                assert work is not None
                work.wait()
    assert time.monotonic() - start < 55
    dist.destroy_process_group(group)


def test_bits_and_bool(world: SimpleNamespace) -> None:
    bits = torch.tensor([1 << (world.rank % 8), 0xFF ^ (1 << (world.rank % 8))], dtype=torch.int32)
    every = [torch.tensor([1 << (r % 8), 0xFF ^ (1 << (r % 8))], dtype=torch.int32) for r in range(world.size)]
    for op, of in [(Op.BOR, torch.bitwise_or), (Op.BAND, torch.bitwise_and), (Op.BXOR, torch.bitwise_xor)]:
        tensor, answer = bits.clone(), every[0]
        for other in every[1:]:
            answer = of(answer, other)
        dist.all_reduce(tensor, op)
        assert tensor.equal(answer)
    for op, answer in [(Op.SUM, [True, False, True]), (Op.MIN, [False, False, True]), (Op.BOR, [True, False, True])]:
        flags = torch.tensor([world.rank == 1, False, True])
        dist.all_reduce(flags, op)
        assert flags.tolist() == answer
    with pytest.raises(ValueError, match="cannot reduce"):
        dist.all_reduce(torch.ones(2, dtype=torch.int32), Op.AVG)


def moved(group: Any, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Run the operations that move data on a group of all ranks; return all that they wrote."""
    rank, size = group.rank(), group.size()
    mine = layout(sample(rank, (size * 2, 3), dtype))
    told = layout(mine)
    dist.broadcast(told, size - 1, group=group)
    gathered = [layout(torch.zeros(size * 2, 3, dtype=dtype)) for _ in range(size)]
    dist.all_gather(gathered, mine, group=group)
    collected = [layout(torch.zeros(size * 2, 3, dtype=dtype)) for _ in range(size)]
    dist.gather(mine, collected if rank == 1 else None, 1, group=group)
    dealt = layout(torch.zeros(2, 3, dtype=dtype))
    dist.scatter(dealt, list(mine.chunk(size)) if rank == 1 else None, 1, group=group)
    return [told, *gathered, *collected, dealt]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_like_gloo(
    world: SimpleNamespace, gloo: dist.ProcessGroup, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    ours, theirs = moved(dist.group.WORLD, dtype, layout), moved(gloo, dtype, torch.clone)
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_gather_and_scatter_with_aliases(world: SimpleNamespace, half: dist.ProcessGroup, dtype: torch.dtype) -> None:
    size, rank = half.size(), half.rank()
    members = dist.get_process_group_ranks(half)
    every = torch.cat([sample(member, (4,), dtype) for member in members])
    total = sum(sample(member, (4 * size,), dtype) for member in members)
    out = torch.zeros(4 * size, dtype=dtype)
    out[4 * rank : 4 * rank + 4] = sample(world.rank, (4,), dtype)
    dist.all_gather_into_tensor(out, out[4 * rank : 4 * rank + 4], group=half)
    assert out.equal(every)
    out[:4] = sample(world.rank, (4,), dtype)  # an input that lies elsewhere in the output
    dist.all_gather_into_tensor(out, out[:4], group=half)
    assert out.equal(every)
    for at in (0, rank):
        source = sample(world.rank, (4 * size,), dtype)
        dist.reduce_scatter_tensor(source[4 * at : 4 * at + 4], source, group=half)
        assert source[4 * at : 4 * at + 4].equal(total[4 * rank : 4 * rank + 4])
    source, piece = sample(world.rank, (4 * size,), dtype), strided(torch.zeros(4, dtype=dtype))
    dist.reduce_scatter_tensor(piece, strided(source), group=half)
    assert piece.equal(total[4 * rank : 4 * rank + 4])
    dist.reduce_scatter(piece, list(source.chunk(size)), group=half)
    assert piece.equal(total[4 * rank : 4 * rank + 4])
    with pytest.raises(ValueError, match="do not make up"):
        dist.all_gather_into_tensor(out[:-1], piece, group=half)


def test_all_to_all(world: SimpleNamespace) -> None:
    size, rank = world.size, world.rank
    rows = torch.arange(size * (size + 1) // 2) + 1000 * rank  # target t gets t + 1 rows
    splits = [target + 1 for target in range(size)]
    expected = torch.cat([rows.split(splits)[rank] - 1000 * rank + 1000 * source for source in range(size)])
    out = torch.zeros(size * (rank + 1), dtype=rows.dtype)
    dist.all_to_all_single(out, rows, [rank + 1] * size, splits)
    assert out.equal(expected)
    outs = [torch.zeros(rank + 1, dtype=rows.dtype) for _ in range(size)]
    dist.all_to_all(outs, list(rows.split(splits)))
    assert torch.cat(outs).equal(expected)
    square = torch.arange(size) + 100 * rank
    dist.all_to_all_single(square, square)
    assert square.equal(torch.arange(size) * 100 + rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_point_to_point(world: SimpleNamespace, dtype: torch.dtype) -> None:
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    got = [strided(torch.zeros(5, dtype=dtype)) for _ in range(3)]
    works = [dist.irecv(got[tag], before, tag=tag) for tag in (2, 0, 1)]
    works += [dist.isend(strided(sample(10 * world.rank + tag, (5,), dtype)), after, tag=tag) for tag in range(3)]
    for work in reversed(works):
        work.wait()
        assert work.is_completed()
    assert all(got[tag].equal(sample(10 * before + tag, (5,), dtype)) for tag in range(3))
    both = [dist.P2POp(dist.isend, got[0].clone(), after), dist.P2POp(dist.irecv, got[1], before)]
    for work in dist.batch_isend_irecv(both):
        work.wait()
    assert got[1].equal(sample(10 * ((before - 1) % world.size), (5,), dtype))
    if world.rank:
        dist.send(torch.tensor([world.rank]), 0, tag=7)
    else:
        box = torch.zeros(1, dtype=torch.int64)
        sources = []
        for _ in range(world.size - 1):
            sources.append(dist.recv(box, tag=7))
            assert box.item() == sources[-1]
        assert sorted(sources) == list(range(1, world.size))


def test_many_in_flight(world: SimpleNamespace, half: dist.ProcessGroup) -> None:
    """Waited for in another order on every rank, on two groups, with a send that nobody waits for."""
    dist.isend(torch.full((1000,), world.rank), (world.rank + 1) % world.size, tag=3)
    tensors = [torch.full((size,), float(world.rank)) for size in (1, 1000, 100_000, 10)]
    works: list[Any] = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    ours = torch.full((7,), float(world.rank))
    works.append(dist.all_reduce(ours, group=half, async_op=True))
    order = torch.randperm(len(works), generator=torch.Generator().manual_seed(world.rank))
    for index in order.tolist():
        works[index].wait()
    total = world.size * (world.size - 1) / 2
    assert all(tensor.eq(total).all() for tensor in tensors)
    assert ours.eq(sum(dist.get_process_group_ranks(half))).all()
    box = torch.zeros(1000, dtype=torch.int64)
    dist.recv(box, (world.rank - 1) % world.size, tag=3)
    assert box.eq((world.rank - 1) % world.size).all()
    (value,) = dist.all_reduce(torch.ones(2), async_op=True).get_future().wait()
    assert value.eq(world.size).all()


def test_same_bits(world: SimpleNamespace) -> None:
    source = torch.randn(50_003, generator=torch.Generator().manual_seed(world.rank))
    results = [source.clone() for _ in range(3)]
    for result in results:
        dist.all_reduce(result)
    digest = [hash(result.numpy().tobytes()) for result in results]
    assert len(set(digest)) == 1
    assert world.comm.allgather(results[0].numpy().tobytes()).count(results[0].numpy().tobytes()) == world.size


def test_timeout_instead_of_a_hang(world: SimpleNamespace) -> None:
    box = torch.zeros(1)
    work = dist.irecv(box, world.rank, tag=9)
    with pytest.raises(TimeoutError, match="did not arrive"):
        work.wait(timedelta(milliseconds=50))
    sent = dist.group.WORLD.send([torch.ones(1)], world.rank, 9)  # torch's own isend refuses to send to oneself
    assert work.wait() and sent.wait()
    assert box.item() == 1


def test_groups_come_and_go(world: SimpleNamespace) -> None:
    """Each of these takes one of MPI's communicators, of which there are about two thousand."""
    for index in range(300):
        width = (2, 4, world.size)[index % 3]
        start = world.rank // width * width
        ranks = list(range(start, min(start + width, world.size)))
        group = dist.new_group(ranks, use_local_synchronization=True)
        tensor = torch.ones(1)
        dist.all_reduce(tensor, group=group)
        assert tensor.item() == len(ranks)
        dist.destroy_process_group(group)


def test_objects_and_names(world: SimpleNamespace, half: dist.ProcessGroup) -> None:
    told: list[Any] = [None] * half.size()
    dist.all_gather_object(told, {"rank": world.rank}, group=half)
    assert [one["rank"] for one in told] == dist.get_process_group_ranks(half)
    box = [world.rank]
    dist.broadcast_object_list(box, src=world.size - 1)
    assert box == [world.size - 1]
    dist.barrier(group=half)
    assert dist.get_backend(half) == "cpu:mpi4py"
    assert half.group_name != dist.group.WORLD.group_name


def test_functional_collectives(world: SimpleNamespace) -> None:
    size, mine = world.size, torch.arange(float(world.size)) + world.rank
    total = torch.arange(float(size)) * size + size * (size - 1) / 2
    group = dist.group.WORLD
    assert (functional.all_reduce(mine, "sum", group) + 0).equal(total)
    gathered = functional.all_gather_tensor(mine, 0, group) + 0
    assert gathered.view(size, size)[size - 1].equal(torch.arange(float(size)) + size - 1)
    assert (functional.reduce_scatter_tensor(mine, "sum", 0, group) + 0).equal(total[world.rank : world.rank + 1])
    swapped = functional.all_to_all_single(mine, None, None, group) + 0
    assert swapped.equal(torch.arange(float(size)) + world.rank)
    summed = functional.all_reduce_coalesced([mine, mine * 2], "sum", group)
    assert (summed[0] + summed[1]).equal(3 * total)
    averages = functional.reduce_scatter_tensor_coalesced([mine, mine], "avg", [0, 0], group)
    assert torch.allclose(averages[0] + averages[1], 2 * total[world.rank : world.rank + 1] / size)
