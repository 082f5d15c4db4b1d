"""Messages between ranks of a host: through memory, through MPI where there is none, and from elsewhere."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hpcpar.comm import mpi_outbox
from hpcpar.comm.mpi_backend import register
from hpcpar.comm.mpi_outbox import Block, Outbox, part_of

LENGTHS = [0, 1, 23, 24, 4096, 100_003, 3 << 20]  # shorter and longer than the message that says where a long one lies


# -- one outbox, played in one process


def memory_bytes(outbox: Outbox) -> int:
    return 512 * os.fstat(outbox.name[1]).st_blocks


def test_blocks_are_used_again_and_never_twice_at_once() -> None:
    outbox, choose = Outbox(), random.Random(7)
    lent: list[tuple[Block, bytes]] = []
    for turn in range(600):
        if len(lent) > 20 or (lent and choose.random() < 0.4):
            block, data = lent.pop(choose.randrange(len(lent)))
            got = bytearray(len(data))
            block.take(memoryview(got))
            assert got == data and not block.full
            outbox.give_back(block)
        else:
            data = bytes([turn % 256]) * choose.choice(LENGTHS[:-1])
            block = outbox.lend(len(data))
            assert not block.full
            block.put(memoryview(data))
            lent.append((block, data))
    assert len({part_of(block.start, block.length) for block, _ in lent}) <= len(LENGTHS)
    end = outbox._end
    for _ in range(1000):
        outbox.give_back(outbox.lend(4096))
    assert outbox._end == end


@pytest.mark.parametrize("kept", [1 << 24, 1 << 18])
def test_only_long_blocks_give_their_memory_back(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi_outbox, "_KEPT_BYTES", kept)
    outbox, data = Outbox(), memoryview(bytes([1]) * (1 << 20))
    for _ in range(2):
        block = outbox.lend(len(data))
        block.put(data)
        assert memory_bytes(outbox) > len(data)
        got = bytearray(10)
        block.take(memoryview(got))
        assert got == bytes(data[:10])
        outbox.give_back(block)
        assert (memory_bytes(outbox) > len(data)) == (kept > len(data))


@pytest.mark.parametrize("lengths", [(10, 1 << 25, 10, 1 << 27, 1 << 24), (1 << 26, 1, 1 << 25)])
def test_blocks_longer_than_a_mapping_lie_apart(lengths: tuple[int, ...]) -> None:
    outbox = Outbox()
    blocks = [outbox.lend(length) for length in lengths]
    ends = sorted((block.start, block.start + block.length) for block in blocks)
    assert all(first[1] <= second[0] for first, second in pairwise(ends))
    for mark, block in enumerate(blocks):
        block.put(memoryview(bytes([mark, mark])))
    for mark, block in enumerate(blocks):
        start, end = part_of(block.start, block.length)
        assert start <= block.start and block.start + block.length <= end
        got = bytearray(2)
        block.take(memoryview(got))
        assert got == bytes([mark, mark])


# -- on 8 ranks


@pytest.fixture(params=["memory", "mpi", "two hosts"])
def group(world: SimpleNamespace, request: pytest.FixtureRequest,
          monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """All ranks: on a host with memory for messages, on one where no rank can open another's, and on two hosts."""
    if request.param == "mpi":
        monkeypatch.setattr(mpi_outbox, "_FILES", "/nowhere/{}/{}")
    register(f"mpi4py_outbox_{request.param.replace(' ', '_')}")
    made: Any = dist.new_group(backend=f"mpi4py_outbox_{request.param.replace(' ', '_')}")
    home = made._home
    assert (home.mail is None) == (request.param == "mpi")
    if request.param == "two hosts":
        here = {rank: place for rank, place in home.on_host.items() if rank // 4 == world.rank // 4}
        mail = replace(home.mail, files={rank: home.mail.files[rank] for rank in here})
        made._home = replace(home, on_host=here, mail=mail)
    yield made
    dist.destroy_process_group(made)


def message(sender: int, receiver: int, num_bytes: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * sender + receiver)
    return torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8)


@pytest.mark.mpi
@pytest.mark.parametrize("num_bytes", LENGTHS)
def test_everyone_to_everyone(world: SimpleNamespace, group: Any, num_bytes: int) -> None:
    others = [rank for rank in range(world.size) if rank != world.rank]
    got = {rank: torch.zeros(num_bytes, dtype=torch.uint8) for rank in others}
    for _ in range(2):  # the second time through the same memory
        works = [dist.irecv(got[rank].zero_(), rank, group) for rank in others]
        works += [dist.isend(message(world.rank, rank, num_bytes), rank, group) for rank in others]
        for work in works:
            work.wait()
        assert all(got[rank].equal(message(rank, world.rank, num_bytes)) for rank in others)
    assert not group._in_flight and not (group._home.mail and group._home.mail.expected)


@pytest.mark.mpi
def test_messages_from_anyone_and_of_any_length(world: SimpleNamespace, group: Any) -> None:
    """What a receive from anyone gets may be the message itself or the place where it lies."""
    for num_bytes in LENGTHS:
        if world.rank:
            dist.send(message(world.rank, 0, num_bytes), 0, group, tag=num_bytes)
            continue
        got = torch.zeros(num_bytes, dtype=torch.uint8)
        sources = []
        for _ in range(world.size - 1):
            sources.append(dist.recv(got, None, group, tag=num_bytes))
            assert got.equal(message(sources[-1], 0, num_bytes))
        assert sorted(sources) == list(range(1, world.size))


@pytest.mark.mpi
def test_a_sender_is_let_go_while_its_receiver_waits_for_something_else(world: SimpleNamespace, group: Any) -> None:
    """One waits for the second message; the other sends it only when the first is received."""
    partner = world.rank ^ 1
    first, second = (torch.zeros(1 << 20, dtype=torch.uint8) for _ in range(2))
    if world.rank % 2:
        early, late = dist.irecv(first, partner, group, tag=1), dist.irecv(second, partner, group, tag=2)
        late.wait()
        early.wait()
        assert first.eq(1).all() and second.eq(2).all()
    else:
        for tag in (1, 2):
            dist.isend(torch.full_like(first, tag), partner, group, tag=tag).wait()


@pytest.mark.mpi
def test_a_send_is_over_when_its_message_is_received(world: SimpleNamespace, group: Any) -> None:
    """So that who never receives is found where a sender waits."""
    if group._home.mail is None:
        pytest.skip("MPI buffers short messages")
    partner, got = world.rank ^ 1, torch.zeros(8)
    if world.rank % 2:
        world.comm.Barrier()
        dist.recv(got, partner, group)
        world.comm.Barrier()
    else:
        work = dist.isend(torch.ones(8), partner, group)
        assert not work.is_completed()
        world.comm.Barrier()
        world.comm.Barrier()
        assert work.is_completed()


@pytest.mark.mpi
def test_a_message_that_is_too_long_is_refused_and_the_next_one_comes(world: SimpleNamespace, group: Any) -> None:
    if group._home.mail is None:
        pytest.skip("MPI's own error ends the job")
    partner, got = world.rank ^ 1, torch.zeros(10)
    if world.rank % 2:
        with pytest.raises(ValueError, match=rf"rank {partner} sent 400 bytes where the receive has room for 40"):
            dist.recv(got, partner, group)
        dist.recv(got, partner, group)
        assert got.eq(2).all()
    else:
        dist.send(torch.ones(100), partner, group)
        dist.send(torch.full((10,), 2.0), partner, group)


@pytest.mark.mpi
def test_what_a_rank_keeps_does_not_grow_with_its_messages(world: SimpleNamespace, group: Any) -> None:
    def exchange(num: int) -> None:
        for _ in range(num):
            got = torch.empty(1 << 16)
            works = [dist.irecv(got, world.rank ^ 1, group), dist.isend(torch.ones(1 << 16), world.rank ^ 1, group)]
            for work in works:
                work.wait()

    def descriptors() -> int:
        return len([*Path("/proc/self/fd").iterdir()])

    exchange(3)
    before = descriptors()
    exchange(30)
    assert descriptors() == before
    if group._home.mail:
        assert len(group._home.mail.parts) <= world.size * len(LENGTHS)
