"""All ranks' calls match, and a world with a flaw is refused with the place of the flaw."""

from __future__ import annotations

from itertools import pairwise

import pytest

from hpcpar.errors import HpcparError
from hpcpar.layout.layout import Layout
from hpcpar.layout.matching import Does, Matched, Move, match, moves_of_layout
from hpcpar.layout.traffic import Call, Traffic
from tests.parity.jobs import SCHEDULES, all_pairs, job_of, name_of

PLAIN = {"schedule": "1f1b", "sequence_parallel": True, "tied": True, "kind": "gpt", "vocab": 61, "spare_layers": 1,
         "kv_heads": 8, "clip": 0.05, "accumulation": 4, "recompute": "none", "dropout": 0.1, "zero": 1, "ramp": False}


@pytest.mark.parametrize("choice", all_pairs(), ids=name_of)
def test_every_layout_of_the_parity_suite_matches(choice):
    layout = Layout(job_of(choice))
    num = choice["accumulation"]
    found = match(layout.mesh, moves_of_layout(layout, num))
    steps = [Traffic(layout, layout.mesh.coordinates(rank)).step(layout.program(layout.mesh.coordinates(rank).pp_rank,
             num)) for rank in range(layout.mesh.size)]
    assert found.num_calls == sum(len(calls) for calls in steps)
    assert found.num_messages == sum(call.op == "send" for calls in steps for call in calls)


@pytest.mark.parametrize("zero", [(1, 2), (2, 4), (3, 2)], ids=str)
def test_hybrid_sharding_matches_and_adds_a_group_a_place(zero):
    layout = Layout(job_of({**PLAIN, "mesh": (2, 2, 8), "zero": zero}))
    found = match(layout.mesh, moves_of_layout(layout, layout.num_microbatches))
    runs = 8 // zero[1]
    assert found.num_groups == 16 + 4 * runs + 4 * zero[1] + 2 * 16 + 1  # tp, dp, across, pp both ways, everyone


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 4, 2), (2, 8, 1)], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_matches(schedule, mesh):
    layout = Layout(job_of({**PLAIN, "schedule": schedule, "mesh": mesh}))
    num = layout.num_microbatches
    found = match(layout.mesh, moves_of_layout(layout, num))
    crossings = sum(a != b for a, b in pairwise(layout.chunk_ranks))
    assert found.num_messages == mesh[0] * mesh[2] * (2 * num * crossings + 2 * layout.tied_across_stages)


def world(change):
    """Match a 2 x 2 x 2 world whose moves are changed on some rank."""
    layout = Layout(job_of({**PLAIN, "mesh": (2, 2, 2)}))
    good = moves_of_layout(layout, 4)

    def moves(rank):
        own = list(good(rank))
        change(rank, own)
        return own

    return match(layout.mesh, moves)


def first(moves, does, group=""):
    return next(i for i, move in enumerate(moves) if move.does is does and move.group == group)


def test_the_world_without_a_flaw_matches():
    found = world(lambda rank, moves: None)
    assert isinstance(found, Matched) and found.num_ranks == 8
    assert found.num_groups == 4 + 4 + 2 * 4 + 1
    assert "nobody waits for ever" in str(found)


def test_another_size_in_a_collective_is_named():
    def change(rank, moves):
        if rank == 5:
            at = first(moves, Does.MEET, "tp")
            calls = moves[at].calls
            moves[at] = moves[at]._replace(calls=(*calls[:2], calls[2]._replace(num_bytes=7), *calls[3:]))

    with pytest.raises(HpcparError, match=r"tp group of ranks 4-5: .* calls .*all_gather of 7 bytes"):
        world(change)


def test_a_collective_that_one_rank_leaves_out_is_named():
    def change(rank, moves):
        if rank == 2:
            at = first(moves, Does.MEET, "tp")
            moves[at] = moves[at]._replace(calls=moves[at].calls[:-1])

    with pytest.raises(HpcparError, match=r"tp group of ranks 2-3: .*nothing"):
        world(change)


def test_a_message_of_another_size_is_named():
    def change(rank, moves):
        if rank == 0:
            at = first(moves, Does.POST, "pp_forward")
            moves[at] = moves[at]._replace(calls=(moves[at].calls[0]._replace(num_bytes=9),))

    with pytest.raises(HpcparError, match=r"pp_forward: .*rank 0 calls send of 9 bytes"):
        world(change)


def test_a_skipped_message_is_named():
    def change(rank, moves):
        if rank == 1:
            del moves[first(moves, Does.POST, "pp_forward")]

    with pytest.raises(HpcparError, match=r"rank 1 calls send .* for 1rf1 where rank 5 calls receive .* for 1rf0|"
                                          r"rank 5 calls receive .* for 1rf0 where rank 1 calls send .* for 1rf1"):
        world(change)


def test_missing_messages_are_a_deadlock():
    def change(rank, moves):
        if rank == 1:
            moves[:] = [m for m in moves if not (m.does is Does.POST and m.group == "pp_forward")]

    with pytest.raises(HpcparError, match=r"8 ranks wait for each other: .*rank 5 waits for message 1rf0"):
        world(change)


def test_opposite_orders_of_two_groups_are_a_deadlock():
    """Each group alone agrees; together they lock up: what only a play of the whole world shows."""
    def moves(rank):
        tp, dp = (Move(Does.MEET, axis, (Call("all_reduce", axis, 8),)) for axis in ("tp", "dp"))
        return [tp, dp] if rank % 4 in (0, 3) else [dp, tp]

    with pytest.raises(HpcparError, match=r"8 ranks wait for each other: .*rank 0 waits for all_reduce of 8"):
        match(Layout(job_of({**PLAIN, "mesh": (2, 2, 2)})).mesh, moves)


def test_receives_posted_in_another_order_than_their_sends_are_named():
    def change(rank, moves):
        if rank == 4:
            places = [i for i, m in enumerate(moves) if m.does is Does.POST and m.calls[0].op == "receive"][:2]
            a, b = places
            moves[a], moves[b] = moves[b], moves[a]

    with pytest.raises(HpcparError, match=r"for 1rf1 where|for 1rf0 where"):
        world(change)
