"""Schedules checked without a process: order, memory, deadlock, torch's own, and two models of the wires."""

from __future__ import annotations

from itertools import product

import pytest
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from hpcpar.errors import HpcparError
from hpcpar.layout.schedule import (
    Action,
    Kind,
    check_programs,
    compute_actions,
    draw,
    in_flight,
    stage_program,
    tick_table,
)

SCHEDULES = ["gpipe", "1f1b"]
SIZES = list(product(range(1, 9), range(1, 17)))
COMPUTE = (Kind.FORWARD, Kind.BACKWARD)
SENDS = {Kind.SEND_FORWARD: (1, Kind.RECEIVE_FORWARD), Kind.SEND_BACKWARD: (-1, Kind.RECEIVE_BACKWARD)}


def programs(schedule: str, num_stages: int, num: int) -> list[list[Action]]:
    return [stage_program(schedule, num_stages, num, stage) for stage in range(num_stages)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_forward_and_backward_once_and_in_order(schedule: str) -> None:
    for num_stages, num in SIZES:
        for program in programs(schedule, num_stages, num):
            compute = [a for a in program if a.kind in COMPUTE]
            for kind in COMPUTE:
                assert [m for k, m in compute if k is kind] == list(range(num))
            at = {action: i for i, action in enumerate(compute)}
            assert all(at[Action(Kind.FORWARD, m)] < at[Action(Kind.BACKWARD, m)] for m in range(num))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_message_is_sent_and_received_once_beside_its_work(schedule: str) -> None:
    for num_stages, num in SIZES:
        for stage, program in enumerate(programs(schedule, num_stages, num)):
            assert len(set(program)) == len(program)
            first, last = stage == 0, stage == num_stages - 1
            assert len(program) == num * (2 + 2 * (not first) + 2 * (not last))
            for i, (kind, m) in enumerate(program):
                before, after = program[i - 1:i], program[i + 1:i + 2]
                if kind is Kind.FORWARD:
                    assert first or before == [Action(Kind.RECEIVE_FORWARD, m)]
                    assert last or after == [Action(Kind.SEND_FORWARD, m)]
                elif kind is Kind.BACKWARD:
                    assert last or before == [Action(Kind.RECEIVE_BACKWARD, m)]
                    assert first or after == [Action(Kind.SEND_BACKWARD, m)]


def test_microbatches_in_flight() -> None:
    for num_stages, num in SIZES:
        for stage in range(num_stages):
            assert in_flight(compute_actions("1f1b", num_stages, num, stage)) == min(num, num_stages - stage)
            assert in_flight(compute_actions("gpipe", num_stages, num, stage)) == num


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_deadlock_with_nothing_buffered(schedule: str) -> None:
    for num_stages, num in SIZES:
        check_programs(programs(schedule, num_stages, num))


def test_two_stages_that_wait_for_each_other_are_a_deadlock() -> None:
    broken = programs("1f1b", 2, 2)
    send = broken[0].index(Action(Kind.SEND_FORWARD, 0))
    receive = broken[0].index(Action(Kind.RECEIVE_BACKWARD, 0))
    broken[0].insert(send, broken[0].pop(receive))
    with pytest.raises(HpcparError, match="deadlocks: stage 0 at rb0, stage 1 at rf0"):
        check_programs(broken)


@pytest.mark.parametrize("kind", [Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD, Kind.SEND_BACKWARD, Kind.RECEIVE_BACKWARD])
def test_a_lost_action_is_found(kind: Kind) -> None:
    broken = programs("1f1b", 2, 3)
    program = next(p for p in broken if Action(kind, 2) in p)
    program.remove(Action(kind, 2))
    with pytest.raises(HpcparError, match="deadlocks"):
        check_programs(broken)


@pytest.mark.parametrize("kind", [Kind.SEND_FORWARD, Kind.RECEIVE_BACKWARD])
def test_a_message_at_the_wrong_receive_is_a_mismatch(kind: Kind) -> None:
    broken = programs("gpipe", 2, 3)
    a, b = broken[0].index(Action(kind, 0)), broken[0].index(Action(kind, 1))
    broken[0][a], broken[0][b] = broken[0][b], broken[0][a]
    with pytest.raises(HpcparError, match=r"waits for .*, stage \d sends microbatch"):
        check_programs(broken)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bubble_ticks(schedule: str) -> None:
    for num_stages, num in SIZES:
        for row in tick_table(schedule, num_stages, num):
            idle = sum(action is None for action in row)
            assert idle == 2 * (num_stages - 1)  # (p - 1) / m of the 2m busy ones
            assert len(row) == 2 * (num + num_stages - 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tick_tables_obey_the_data(schedule: str) -> None:
    for num_stages, num in SIZES:
        rows = tick_table(schedule, num_stages, num)
        done = {(s, a): t for s, row in enumerate(rows) for t, a in enumerate(row) if a}
        for (stage, action), tick in done.items():
            if action.kind is Kind.FORWARD and stage:
                assert done[stage - 1, action] < tick
            if action.kind is Kind.BACKWARD:
                assert done[stage, Action(Kind.FORWARD, action.microbatch)] < tick
                assert stage == num_stages - 1 or done[stage + 1, action] < tick


@pytest.mark.parametrize(("schedule", "torch_name"), [("gpipe", "GPipe"), ("1f1b", "1F1B")])
def test_the_order_is_the_one_of_torch(schedule: str, torch_name: str) -> None:
    # order only: torch's tables count other idle ticks (a backward of two or three), and its 1F1B wants m >= p
    for num_stages, num in product(range(1, 9), (8, 9, 16)):
        theirs = [[str(a)[len(str(stage)):] for a in row if a is not None and str(a)[-1].isdigit()]
                  for stage, row in enumerate(get_schedule_ops(torch_name, num_stages, num))]
        ours = [[str(a) for a in row if a] for row in tick_table(schedule, num_stages, num)]
        if schedule == "1f1b":  # torch (2.13) numbers the forwards of its last stage from 1, a slip of its table
            ours[-1] = [f"F{int(a[1:]) + 1}" if a[0] == "F" else a for a in ours[-1]]
        assert ours == theirs


def test_the_drawing_is_the_one_of_the_docstring() -> None:
    assert draw("1f1b", 3, 4).splitlines() == [
        "stage 0  F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3",
        "stage 1  .. F0 F1 .. B0 F2 B1 F3 B2 .. B3 ..",
        "stage 2  .. .. F0 B0 F1 B1 F2 B2 F3 B3 .. ..",
    ]


def plays_on_streams(all_programs: list[list[Action]], groups: dict[Kind, str]) -> bool:
    """Play on NCCL-like wires: return whether every stage comes to its end.

    The host runs ahead and queues everything. An operation of a group runs in the order of its stream, when the
    computations queued before it are done, and only together with its counterpart on the other stage (rendezvous). A
    computation runs when the receives and computations queued before it are done.
    """
    streams = [{name: [a for a in p if groups.get(a.kind) == name] for name in set(groups.values())}
               for p in all_programs]
    done: list[set[Action]] = [set() for _ in all_programs]

    def waits_for(stage: int, action: Action) -> bool:
        before = all_programs[stage][:all_programs[stage].index(action)]
        kinds = COMPUTE if action.kind in groups else (*COMPUTE, Kind.RECEIVE_FORWARD, Kind.RECEIVE_BACKWARD)
        return any(a.kind in kinds and a not in done[stage] for a in before[-4 * len(all_programs) - 4:])

    def ready(stage: int, action: Action) -> bool:
        stream = streams[stage][groups[action.kind]]
        return stream[:1] == [action] and not waits_for(stage, action)

    compute = [[a for a in p if a.kind in COMPUTE] for p in all_programs]
    moved = True
    while moved:
        moved = False
        for stage in range(len(all_programs)):
            while compute[stage] and not waits_for(stage, compute[stage][0]):
                done[stage].add(compute[stage].pop(0))
                moved = True
            for stream in streams[stage].values():
                while stream and stream[0].kind in SENDS and ready(stage, stream[0]):
                    step, kind = SENDS[stream[0].kind]
                    received = Action(kind, stream[0].microbatch)
                    if not ready(stage + step, received):
                        break
                    streams[stage + step][groups[kind]].pop(0)
                    done[stage + step].add(received)
                    done[stage].add(stream.pop(0))
                    moved = True
    return all(len(d) == len(p) for d, p in zip(done, all_programs, strict=True))


TWO_GROUPS = {Kind.SEND_FORWARD: "forward", Kind.RECEIVE_FORWARD: "forward",
              Kind.SEND_BACKWARD: "backward", Kind.RECEIVE_BACKWARD: "backward"}
ONE_GROUP = dict.fromkeys(TWO_GROUPS, "both")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_stages", range(1, 9))
def test_no_deadlock_on_nccl_with_a_group_for_each_direction(schedule: str, num_stages: int) -> None:
    for num in range(1, 17):
        assert plays_on_streams(programs(schedule, num_stages, num), TWO_GROUPS), (num_stages, num)


@pytest.mark.parametrize("num_stages", range(2, 9))
def test_with_one_group_1f1b_would_deadlock(num_stages: int) -> None:
    for num in range(1, 9):
        assert plays_on_streams(programs("1f1b", num_stages, num), ONE_GROUP) == (num == 1), (num_stages, num)
