"""Programs on wires: every message once and in one order on both ends, and no schedule locks up."""

from __future__ import annotations

import pytest

from hpcpar.errors import HpcparError
from hpcpar.layout.schedule import (
    COMPUTE,
    RECEIVES,
    SENDS,
    Action,
    Kind,
    Schedule,
    check_programs,
    make_programs,
    make_schedule,
    message,
)
from tests.layout.schedule.cases import NAMES, schedules

ONE_GROUP = dict.fromkeys((*SENDS, *RECEIVES), "both")


@pytest.mark.parametrize("name", NAMES)
def test_no_schedule_locks_up(name: str) -> None:
    for (p, m, _), schedule in schedules(name):
        programs = make_programs(schedule)
        check_programs(programs)
        if p == 4 or m == 8:
            check_programs(programs, ONE_GROUP)


@pytest.mark.parametrize("name", NAMES)
def test_messages_stand_where_they_are_made_and_before_they_are_read(name: str) -> None:
    for (p, _, _), schedule in schedules(name, (1, 2, 5), (5, 10)):
        programs = make_programs(schedule)
        home = schedule.chunk_ranks
        for rank, program in enumerate(programs):
            assert tuple(a for a in program if a.kind in COMPUTE) == schedule.orders[rank]
            assert len(set(program)) == len(program)
            place = {action: i for i, action in enumerate(program)}
            for action in schedule.orders[rank]:
                sent = message(action, schedule.num_chunks)
                if sent and home[sent[1].chunk] != rank:
                    assert all(a.kind not in COMPUTE for a in program[place[action] + 1:place[sent[0]]])
                    assert sent[1] in programs[home[sent[1].chunk]]
                elif sent:
                    assert sent[0] not in place
                reads = Kind.RECEIVE_FORWARD if action.kind is Kind.FORWARD else Kind.RECEIVE_BACKWARD
                if action.kind is not Kind.BACKWARD_WEIGHT:
                    assert place.get(Action(reads, *action[1:]), -1) < place[action]
        # the n-th message from one rank to another is the n-th that the other posts a receive for
        for here in range(p):
            for there in range(p):
                pairs = [(s, r) for s, r in (message(a, schedule.num_chunks) or (None, None)
                                             for a in programs[here] if a.kind in COMPUTE)
                         if r is not None and home[r.chunk] == there != here]
                received = [a for a in programs[there] if a in {r for _, r in pairs}]
                assert received == [r for _, r in pairs]


def beside_their_work(schedule: Schedule) -> list[list[Action]]:
    """Programs with every receive right before the computation that reads it, as one would first write them."""
    programs = []
    for program in make_programs(schedule):
        received = {a for a in program if a.kind in RECEIVES}
        moved: list[Action] = []
        for action in program:
            reads = Action(Kind.RECEIVE_FORWARD if action.kind is Kind.FORWARD else Kind.RECEIVE_BACKWARD, *action[1:])
            if action.kind in COMPUTE and action.kind is not Kind.BACKWARD_WEIGHT and reads in received:
                moved.append(reads)
            moved += [action] if action not in received else []
        programs.append(moved)
    return programs


@pytest.mark.parametrize("p", range(2, 9))
def test_receives_beside_their_work_would_lock_up(p: int) -> None:
    """Why programs take the order of the transfers from paper: on in-order wires these wait for each other."""
    check_programs(beside_their_work(make_schedule("1f1b", p, 8)))
    with pytest.raises(HpcparError, match="deadlocks: rank 0 at "):
        check_programs(beside_their_work(make_schedule("1f1b", p, 8)), ONE_GROUP)
    with pytest.raises(HpcparError, match="deadlocks: rank 0 at "):
        check_programs(beside_their_work(make_schedule("interleaved", p, 2 * p, 2)))


@pytest.mark.parametrize("name", ["1f1b", "zbv"])
@pytest.mark.parametrize("kind", [*SENDS, *RECEIVES])
def test_a_lost_transfer_is_found(name: str, kind: Kind) -> None:
    programs = make_programs(make_schedule(name, 3, 6, 2 if name == "zbv" else 1))
    program = next(p for p in programs if any(a.kind is kind and a.microbatch == 2 for a in p))
    program.remove(next(a for a in program if a.kind is kind and a.microbatch == 2))
    with pytest.raises(HpcparError, match=r"deadlocks|nobody receives"):
        check_programs(programs)


def test_messages_in_another_order_are_found() -> None:
    programs = make_programs(make_schedule("gpipe", 2, 3))
    places = [programs[1].index(Action(Kind.RECEIVE_FORWARD, m, 1)) for m in (0, 1)]
    programs[1][places[0]], programs[1][places[1]] = programs[1][places[1]], programs[1][places[0]]
    with pytest.raises(HpcparError, match="deadlocks: rank 0 at 0sf0, rank 1 at 1rf1"):
        check_programs(programs)
