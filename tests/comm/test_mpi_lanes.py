"""Turns of two ranks that are played in one process."""

from __future__ import annotations

import mmap

import pytest
from torch import Tensor

from hpcpar.comm.mpi_lanes import Lanes, Ticket, Turn, lane_bytes

SLOT = 4096


@pytest.fixture
def pair() -> list[Lanes]:
    memory = mmap.mmap(-1, 2 * lane_bytes(SLOT))
    return [Lanes(memory, rank, 2, SLOT) for rank in (0, 1)]


def test_everyone_who_takes_a_turn_wakes_those_that_have_not() -> None:
    """The last to come may be pushed off its core by the first that it wakes."""
    memory, rung = mmap.mmap(-1, 4 * lane_bytes(SLOT)), [list[list[int]]() for _ in range(4)]
    ranks = [Lanes(memory, rank, 4, SLOT, lambda late, own=own: own.append([*late])) for rank, own in enumerate(rung)]
    tickets = [gather(lanes, "all", 0, []) for lanes in ranks]
    assert rung == [[], [], [], [[0, 1, 2], [0, 1, 2]]]  # the last came, and took
    assert tickets[1].Test() and rung[1] == [[0, 2]]
    assert tickets[0].Test() and rung[0] == [[2]]
    assert tickets[2].Test() and rung[2] == [[0, 1, 3]]  # all have taken: who waits for that may go on
    assert [len(each) for each in rung] == [1, 1, 1, 2]


def gather(lanes: Lanes, meaning: str, value: int, got: list[list[int]]) -> Ticket:
    def put(slot: Tensor) -> None:
        slot[0] = value

    def take(slots: list[Tensor]) -> None:
        got.append([int(slot[0]) for slot in slots])

    return lanes.begin(meaning, [Turn(put, take)])


def test_a_turn_ends_when_both_have_come(pair: list[Lanes]) -> None:
    got: list[list[int]] = []
    first = gather(pair[0], "all", 3, got)
    assert not first.Test() and not got
    assert gather(pair[1], "all", 4, got).Test() and first.Test() and got == [[3, 4], [3, 4]]


@pytest.mark.parametrize("ahead", [0, 1, 7])
def test_a_turn_that_does_not_mean_the_same_to_both_never_ends(pair: list[Lanes], ahead: int) -> None:
    got: list[list[int]] = []
    for number in range(ahead):
        one, other = (gather(lanes, "all", number, got) for lanes in pair)
        assert one.Test() and other.Test()
    got.clear()
    tickets = [gather(pair[0], "all", 1, got), gather(pair[1], "other", 1, got), gather(pair[1], "all", 1, got)]
    assert not any(ticket.Test() for _ in range(3) for ticket in tickets) and got == []


def test_one_runs_ahead_and_loses_nothing(pair: list[Lanes]) -> None:
    """Twenty turns begun by one before the other begins any; half of them put nothing."""
    got: list[list[int]] = []
    order: list[int] = []

    def quiet(lanes: Lanes, number: int) -> Ticket:
        return lanes.begin(f"quiet {number}", [Turn(None, lambda slots: order.append(number))])

    def both(lanes: Lanes) -> list[Ticket]:
        return [ticket for n in range(10) for ticket in (gather(lanes, f"all {n}", n, got), quiet(lanes, n))]

    fast = both(pair[0])
    slow = both(pair[1])
    for _ in range(20):  # both go on
        over = [ticket.Test() for ticket in [*fast, *slow]]
    assert all(over)
    assert sorted(got) == [[n, n] for n in range(10) for _ in pair]
    assert sorted(order) == [n for n in range(10) for _ in pair]


def test_who_gives_own_memory_waits_until_it_is_read(pair: list[Lanes]) -> None:
    given = [lanes.begin("sum", [Turn(None, lambda slots: None, held=True)]) for lanes in pair]
    assert not given[1].Test()  # it has read the other's, the other not yet its own
    assert given[0].Test() and given[1].Test()
