"""Every schedule up to 8 ranks and 16 microbatches: legal, as torch has it, and with the memory of its formula."""

from __future__ import annotations

from itertools import product

import pytest
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from hpcpar.errors import HpcparError
from hpcpar.layout.schedule import (
    Action,
    Kind,
    Schedule,
    check_schedule,
    forward_only,
    in_flight,
    make_schedule,
    place_chunks,
)
from tests.layout.schedule.cases import NAMES, cases, schedules

TORCH = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B", "breadth-first": "LoopedBFS",
         "zero-bubble": "InterleavedZeroBubble", "zbv": "ZBVZeroBubble", "dualpipev": "DualPipeV"}


@pytest.mark.parametrize("name", NAMES)
def test_every_chunk_runs_every_microbatch_once_in_a_possible_order(name: str) -> None:
    for (p, m, v), schedule in schedules(name):
        check_schedule(schedule)
        assert schedule.num_microbatches == m and schedule.num_ranks == p
        assert schedule.chunk_ranks == place_chunks(name, p, v)
        assert schedule.splits == (name in ("zero-bubble", "zbv", "dualpipev"))


@pytest.mark.parametrize("name", NAMES)
def test_the_order_is_the_one_of_torch(name: str) -> None:
    # order only: torch writes fixed idle ticks into its tables, and counts other ones
    compared = 0
    for p, m, v in cases(name, (1, 2, 3, 4, 8), (1, 4, 7, 8, 16)):
        if (name == "1f1b" and m < p) or (TORCH[name] not in ("1F1B", "GPipe") and v == 1):
            continue  # torch refuses these
        theirs = get_schedule_ops(TORCH[name], p, m, v)
        flat = [[part for action in row if action is not None for part in (action.sub_actions or (action,))]
                for row in theirs]
        orders = [[str(a) for a in row if a.computation_type.value in "FBIW"] for row in flat]
        ours = [[str(a) for a in order] for order in make_schedule(name, p, m, v).orders]
        if name == "1f1b":  # torch (2.13) numbers the forwards of its last stage from 1, a slip of its table
            ours[-1] = [f"{p - 1}F{int(a.split('F')[1]) + 1}" if "F" in a else a for a in ours[-1]]
        assert orders == ours, (name, p, m, v)
        compared += 1
    assert compared > 5


def most_held(name: str, p: int, m: int, v: int, rank: int) -> int:
    """In-flight forwards by formula, in chunks."""
    if name in ("gpipe", "breadth-first"):
        return m * v
    if name == "1f1b":
        return min(m, p - rank)
    if name == "interleaved":  # on rank 0 p v (1 + (p - 1) / (p v)): Korthikanti et al. 2022, section 4.2.3
        return min(m * v, p * (v - 1) + 2 * (p - 1 - rank) + 1)
    if name == "zero-bubble":
        return min(m * v, p * v)
    return min(2 * m, 2 * p + (name == "dualpipev"))


@pytest.mark.parametrize("name", NAMES)
def test_forwards_in_flight(name: str) -> None:
    for (p, m, v), schedule in schedules(name):
        if name == "zbv" and m < 2 * p - 1:
            continue  # what is too few for the V is left out of it: no formula
        for rank, order in enumerate(schedule.orders):
            want = most_held(name, p, m, v, rank)
            assert in_flight(order) == want or (name == "dualpipev" and p == 1), (name, p, m, v, rank)


def test_a_v_goes_down_and_up_again() -> None:
    assert place_chunks("zbv", 3, 2) == (0, 1, 2, 2, 1, 0)
    assert place_chunks("interleaved", 3, 2) == (0, 1, 2, 0, 1, 2)


@pytest.mark.parametrize(("p", "num"), list(product((1, 2, 4), (1, 3, 8))))
def test_a_validation_runs_every_forward_once(p: int, num: int) -> None:
    for ranks in (place_chunks("interleaved", p, 2), place_chunks("zbv", p, 2)):
        schedule = forward_only(ranks, num)
        assert schedule.chunk_ranks == ranks
        for order in schedule.orders:
            assert len(set(order)) == len(order) == 2 * num
            assert {action.kind for action in order} == {Kind.FORWARD}


def broken(change: str) -> Schedule:
    orders = [list(order) for order in make_schedule("zero-bubble", 2, 3).orders]
    first = orders[0]
    if change == "twice":
        first.append(first[0])
    elif change == "no forward":
        first.remove(Action(Kind.FORWARD, 1, 0))
    elif change == "no weights":
        first.remove(Action(Kind.BACKWARD_WEIGHT, 1, 0))
    elif change == "both ways":
        first.append(Action(Kind.BACKWARD, 1, 0))
    elif change == "weights first":
        at = [first.index(Action(kind, 1, 0)) for kind in (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)]
        first[at[0]], first[at[1]] = first[at[1]], first[at[0]]
    elif change == "on two ranks":
        orders[1].append(Action(Kind.FORWARD, 3, 0))
    return Schedule(tuple(map(tuple, orders)))


@pytest.mark.parametrize(("change", "said"), [
    ("twice", "0F0 stands 2 times in the order of rank 0"), ("no forward", "0F1 is missing in the order of rank 0"),
    ("no weights", "rank 0 needs either 0B1 or both 0I1 and 0W1"), ("both ways", "rank 0 needs either 0B1 or both"),
    ("weights first", "deadlocks: rank 0 at 0W1 for 0I1"), ("on two ranks", "chunk 0 is on rank 0 and on rank 1"),
])
def test_an_illegal_order_is_refused(change: str, said: str) -> None:
    with pytest.raises(HpcparError, match=said):
        check_schedule(broken(change))
