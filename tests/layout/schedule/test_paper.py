"""Schedules played on paper: bubbles by formula, what the drawing shows, and the old weights of endless pipelines."""

from __future__ import annotations

import pytest

from hpcpar.errors import UserError
from hpcpar.layout.schedule import (
    Action,
    Kind,
    Schedule,
    dependencies,
    draw,
    draw_stale,
    ends_as,
    make_schedule,
    play_on_paper,
    staleness,
    stream,
    tick_table,
    updates_behind,
)
from tests.layout.schedule.cases import NAMES, schedules

FORWARD_S, INPUT_S, WEIGHT_S = 1.0, 1.25, 0.5
SECONDS = {Kind.FORWARD: FORWARD_S, Kind.BACKWARD: INPUT_S + WEIGHT_S, Kind.BACKWARD_INPUT: INPUT_S,
           Kind.BACKWARD_WEIGHT: WEIGHT_S}


def bubble(schedule: Schedule, seconds: dict[Kind, float]) -> float:
    """The step's time beyond what each rank computes (all compute alike)."""
    spans = play_on_paper(schedule, lambda action: seconds[action.kind])
    return max(span.end for span in spans.values()) - sum(seconds[action.kind] for action in schedule.orders[0])


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "breadth-first"])
def test_the_bubble_of_whole_backwards(name: str) -> None:
    """(p-1)(F+B) of a chunk: over the ideal m v (F+B) it is (p-1)/(v m)."""
    for (p, m, _), schedule in schedules(name):
        if name == "breadth-first" and m < p:
            continue  # the ring is not filled
        assert bubble(schedule, SECONDS) == pytest.approx((p - 1) * (FORWARD_S + INPUT_S + WEIGHT_S))


def test_the_bubble_of_zero_bubble() -> None:
    """(p-1)(F+I-W), a third of 1F1B's where all three are equal (Qi et al. 2023, table 2)."""
    for (p, m, _), schedule in schedules("zero-bubble"):
        if m >= p:
            assert bubble(schedule, SECONDS) == pytest.approx((p - 1) * (FORWARD_S + INPUT_S - WEIGHT_S))


@pytest.mark.parametrize("name", ["zbv", "dualpipev"])
def test_a_v_only_waits_for_its_first_microbatch(name: str) -> None:
    """With F, I and W of equal length stage r idles r ticks at the start, and never more than p-1 in all."""
    equal = dict.fromkeys(SECONDS, 1.0) | {Kind.BACKWARD: 2.0}
    for (p, m, _), schedule in schedules(name):
        if m >= 2 * p - 1:
            assert bubble(schedule, equal) == p - 1


@pytest.mark.parametrize("name", NAMES)
def test_spans_obey_the_data_and_the_order(name: str) -> None:
    for _, schedule in schedules(name, (2, 3, 5), (6, 10)):
        spans = play_on_paper(schedule, lambda action: SECONDS[action.kind], lambda action: 0.125)
        ended = {done: (schedule.chunk_ranks[action.chunk], span.end)
                 for action, span in spans.items() for done in ends_as(action)}
        for rank, order in enumerate(schedule.orders):
            at = 0.0
            for action in order:
                ready = [end + (0.125 if home != rank else 0)
                         for home, end in (ended[need] for need in dependencies(action, schedule.num_chunks))]
                assert spans[action].start == max([at, *ready])  # as soon as possible
                at = spans[action].end
                assert at == spans[action].start + SECONDS[action.kind]


def test_what_waits_for_what() -> None:
    F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741
    assert dependencies(Action(F, 3, 0), 4) == []
    assert dependencies(Action(F, 3, 2), 4) == [Action(F, 3, 1)]
    assert dependencies(Action(B, 3, 3), 4) == [Action(F, 3, 3)]
    assert dependencies(Action(I, 3, 1), 4) == [Action(F, 3, 1), Action(I, 3, 2)]
    assert dependencies(Action(W, 3, 1), 4) == [Action(I, 3, 1)]
    assert ends_as(Action(B, 3, 1)) == (Action(B, 3, 1), Action(I, 3, 1), Action(W, 3, 1))


def test_the_drawing_is_the_one_of_the_docstring() -> None:
    assert draw(make_schedule("1f1b", 3, 4)).splitlines() == [
        "stage 0  F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3",
        "stage 1  .. F0 F1 .. B0 F2 B1 F3 B2 .. B3 ..",
        "stage 2  .. .. F0 B0 F1 B1 F2 B2 F3 B3 .. ..",
    ]


def test_drawings_of_chunks_of_split_backwards_and_of_many_ticks() -> None:
    assert draw(make_schedule("interleaved", 2, 2, 2)).splitlines() == [
        "stage 0  0F0 0F1 2F0 2F1 ... 2B0 ... 2B1 0B0 0B1",
        "stage 1  ... 1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1 ...",
    ]
    assert draw(make_schedule("dualpipev", 2, 4, 2)).splitlines()[0].startswith(
        "stage 0  0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1 --- 3F2 0B0 --- 3B2")
    long = draw(make_schedule("gpipe", 2, 100)).splitlines()
    assert all("~ 138 ticks ~" in line for line in long)
    assert all(len(row) == 202 for row in tick_table(make_schedule("gpipe", 2, 100)))


@pytest.mark.parametrize("p", range(1, 9))
def test_pipedream_is_as_stale_as_its_formula(p: int) -> None:
    for rank, order in enumerate(stream(p, 4, 5).orders):
        versions, delay = staleness("pipedream", p, 4)[rank]
        assert max(updates_behind(order, 1)) == delay == versions - 1


@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 2), (4, 4), (4, 7), (8, 16)])
def test_2bw_is_one_update_behind_everywhere(p: int, m: int) -> None:
    for order, (versions, delay) in zip(stream(p, m, 4).orders, staleness("2bw", p, m), strict=True):
        assert max(updates_behind(order, m)) <= delay == versions - 1 == 1


def test_2bw_needs_a_microbatch_for_every_stage() -> None:
    assert max(updates_behind(stream(4, 3, 4).orders[0], 3)) == 1
    with pytest.raises(UserError, match="nearest legal: 4 microbatches"):
        staleness("2bw", 4, 3)
    assert "on paper only" in draw_stale("2bw", 2, 4)
