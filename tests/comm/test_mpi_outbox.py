"""Messages between ranks: of a host, through memory or MPI, and from elsewhere."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hpcpar.comm import mpi_bells, mpi_outbox
from hpcpar.comm.mpi_backend import register
from hpcpar.comm.mpi_outbox import Block, Outbox, part_of

LENGTHS = [0, 1, 31, 32, 100_003, (1 << 20) + 1]  # shorter and longer than the message that says where a long one lies


# -- one outbox, played in one process


def memory_bytes(outbox: Outbox) -> int:
    return 512 * Path(outbox.name[0]).stat().st_blocks


def test_blocks_are_used_again_and_never_twice_at_once() -> None:
    outbox, choose, starts = Outbox(), random.Random(7), set()
    lent: list[tuple[Block, bytes]] = []
    for turn in range(600):
        if len(lent) > 20 or (lent and choose.random() < 0.4):
            block, data = lent.pop(choose.randrange(len(lent)))
            got = bytearray(len(data))
            block.take(memoryview(got))
            assert got == data and not block.full
        else:
            data = bytes([turn % 256]) * choose.choice(LENGTHS[:-1])
            block = outbox.put(memoryview(data))
            assert block.full
            lent.append((block, data))
            starts.add(block.start)
    assert len(starts) <= 2 * 22  # of two lengths, and never more than 22 in use
    outbox.put(memoryview(b""))  # now it looks what is empty
    assert outbox.waiting_bytes == sum(len(data) for _, data in lent)


@pytest.mark.parametrize("kept", [1 << 24, 1 << 18])
def test_empty_blocks_keep_so_much_memory_and_no_more(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi_outbox, "_KEPT_BYTES", kept)
    outbox, data, got = Outbox(), memoryview(bytes([1]) * (1 << 20)), bytearray(10)
    for _ in range(3):
        block = outbox.put(data)
        assert memory_bytes(outbox) > len(data)
        block.take(memoryview(got))
        assert got == bytes(data[:10])
        outbox.put(data[:1]).take(memoryview(got)[:1])  # now it looks what is empty
        assert (memory_bytes(outbox) > len(data)) == (kept > len(data))


@pytest.mark.parametrize("lengths", [(10, 1 << 25, 10, 1 << 26, 1 << 24), (1 << 26, 1, 1 << 25)])
def test_blocks_longer_than_a_mapping_lie_apart(lengths: tuple[int, ...]) -> None:
    outbox = Outbox()
    blocks = [outbox.put(memoryview(bytearray(length))) for length in lengths]
    ends = sorted((block.start, block.start + block.length) for block in blocks)
    assert all(first[1] <= second[0] for first, second in pairwise(ends))
    for block, length in zip(blocks, lengths, strict=True):
        start, end = part_of(block.start, block.length)
        assert start <= block.start and block.start + block.length <= end and block.length > length


# -- on 8 ranks


@pytest.fixture(params=["direct", "outbox", "cells", "two hosts"])
def group(world: SimpleNamespace, request: pytest.FixtureRequest,
          monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """All ranks: as they are; where none may read another's memory, nor its file; where outboxes end with a host."""
    if request.param != "direct":
        monkeypatch.setattr(mpi_bells, "_PROBE_S", 0.0)
    if request.param == "cells":
        monkeypatch.setattr(mpi_outbox, "_FILES", "/nowhere/{}/{}")
    register(f"mpi4py_of_{request.param.replace(' ', '_')}")
    made: Any = dist.new_group(backend=f"mpi4py_of_{request.param.replace(' ', '_')}")
    home = made._home
    if request.param != "direct":
        assert (home.mail is None) == (request.param == "cells")
    if request.param == "two hosts":
        here = {rank: place for rank, place in home.on_host.items() if rank // 4 == world.rank // 4}
        mail = copy(home.mail)
        mail.files = {rank: mail.files[rank] for rank in here}
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
    assert not group._in_flight and not (group._home.mail and group._home.mail._expected)


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
@pytest.mark.parametrize("waiting_bytes", [0, 1 << 28])
@pytest.mark.parametrize("asks", [False, True])
def test_a_sender_is_let_go_while_its_receiver_is_after_something_else(
        world: SimpleNamespace, group: Any, asks: bool, waiting_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One waits for the second message, or asks again and again; the other sends it only when the first is through."""
    monkeypatch.setattr(mpi_outbox, "_WAITING_BYTES", waiting_bytes)
    partner = world.rank ^ 1
    first, second = (torch.zeros(1 << 20, dtype=torch.uint8) for _ in range(2))
    if world.rank % 2:
        early, late = dist.irecv(first, partner, group, tag=1), dist.irecv(second, partner, group, tag=2)
        while asks and not late.is_completed():
            time.sleep(0.001)
        late.wait()
        early.wait()
        assert first.eq(1).all() and second.eq(2).all()
    else:
        for tag in (1, 2):
            dist.isend(torch.full_like(first, tag), partner, group, tag=tag).wait()


@pytest.mark.mpi
@pytest.mark.parametrize("waiting_bytes", [0, 1 << 28])
def test_a_send_is_over_at_once_unless_too_much_waits(world: SimpleNamespace, group: Any, waiting_bytes: int,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sent may be written again, and its receiver may be in a call of MPI's own."""
    if group._home.mail is None:
        pytest.skip("MPI buffers short messages")
    monkeypatch.setattr(mpi_outbox, "_WAITING_BYTES", waiting_bytes)
    partner, got = world.rank ^ 1, torch.zeros(1 << 18)
    if world.rank % 2:
        work = dist.irecv(got, partner, group)
        world.comm.Barrier()
        work.wait()
        world.comm.Barrier()
        assert got.eq(1).all()
    else:
        sent = torch.ones(1 << 18)
        work = dist.isend(sent, partner, group)
        if waiting_bytes:
            work.wait()
            sent.zero_()
        else:
            assert not work.is_completed()
        world.comm.Barrier()
        world.comm.Barrier()
        assert work.is_completed()


@pytest.mark.mpi
def test_a_send_that_waits_is_over_though_its_memory_holds_another_message(world: SimpleNamespace, group: Any,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks whether the first is over before the second is sent, which is received only then."""
    monkeypatch.setattr(mpi_outbox, "_WAITING_BYTES", 0)
    partner, got = world.rank ^ 1, torch.zeros(8)
    if world.rank % 2:
        dist.recv(got, partner, group, tag=1)
        world.comm.Barrier()
        dist.recv(got, partner, group, tag=2)  # is sent once the first is over
        dist.recv(got, partner, group, tag=1)
        assert got.eq(3).all()
    else:
        first = dist.isend(torch.full((8,), 1.0), partner, group, tag=1)
        world.comm.Barrier()  # it is received now
        last = dist.isend(torch.full((8,), 3.0), partner, group, tag=1)
        first.wait()
        dist.isend(torch.full((8,), 2.0), partner, group, tag=2).wait()
        last.wait()


@pytest.mark.mpi
def test_a_message_shorter_than_its_receive_leaves_the_rest(world: SimpleNamespace, group: Any) -> None:
    for num_bytes in (0, 5, 30):
        for anyone in (False, True):
            if world.rank:
                dist.send(message(world.rank, 0, num_bytes), 0, group)
                continue
            for source in range(1, world.size):
                got = torch.full((40,), 77, dtype=torch.uint8)
                found = dist.recv(got, None if anyone else source, group)
                assert anyone or found == source
                assert got[:num_bytes].equal(message(found, 0, num_bytes)) and got[num_bytes:].eq(77).all()
        dist.barrier(group)


@pytest.mark.mpi
@pytest.mark.parametrize("anyone", [False, True])
def test_a_message_that_is_too_long_is_refused_where_it_is_awaited(world: SimpleNamespace, group: Any,
                                                                   anyone: bool) -> None:
    if group._home.mail is None:
        pytest.skip("MPI's own error ends the job")
    partner, got, other = world.rank ^ 1, torch.zeros(10), torch.zeros(1)
    if world.rank % 2:
        work: Any = dist.irecv(got, None if anyone else partner, group, tag=1)
        dist.recv(other, partner, group, tag=2)  # finds both
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"rank {partner} sent 400 bytes where the receive has room for 40"):
                work.wait()
        assert got.eq(3).all() and other == 5
        dist.recv(got, partner, group, tag=1)
        assert got.eq(2).all()
    else:
        dist.send(torch.full((100,), 3.0), partner, group, tag=1)
        dist.send(torch.full((1,), 5.0), partner, group, tag=2)
        dist.send(torch.full((10,), 2.0), partner, group, tag=1)


@pytest.mark.mpi
def test_what_a_rank_keeps_does_not_grow_with_its_messages(world: SimpleNamespace, group: Any) -> None:
    def exchange(num: int) -> None:
        for _ in range(num):
            got = torch.empty(1 << 16)
            works = [dist.irecv(got, world.rank ^ 1, group), dist.isend(torch.ones(1 << 16), world.rank ^ 1, group)]
            for work in works:
                work.wait()

    def kept() -> tuple[int, int, int]:
        mail = group._home.mail
        return len([*Path("/proc/self/fd").iterdir()]), len(mail._parts), memory_bytes(mail._own)

    if group._home.mail is None:
        pytest.skip("MPI's own memory")
    exchange(3)
    before = kept()
    exchange(30)
    descriptors, parts, num_bytes = kept()
    assert descriptors <= before[0] and parts <= before[1] and num_bytes <= before[2] + (1 << 20)
