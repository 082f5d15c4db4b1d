from __future__ import annotations

import random

import pytest

from hpcpar.layout.schedule import in_flight, make_schedule
from hpcpar.planner.timeline import held, length_s, pipeline_s, play, steady_step_s

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("breadth-first", 2), ("zero-bubble", 1), ("zbv", 2),
             ("dualpipev", 2)]


@pytest.mark.parametrize(("name", "chunks"), SCHEDULES)
def test_numbers_play_as_actions_do(name: str, chunks: int) -> None:
    chance = random.Random(1)
    for ranks, microbatches in ((1, 4), (2, 4), (3, 12), (4, 16)):
        if ranks == 1 and chunks > 1:
            continue
        forward = [1 + chance.random() for _ in range(ranks * chunks)]
        backward = [2 * f for f in forward]
        schedule = make_schedule(name, ranks, microbatches, chunks)
        spans = play(schedule, forward, backward, 0.25)
        assert length_s(schedule, forward, backward, 0.25) == pytest.approx(max(s.end for s in spans.values()))


@pytest.mark.parametrize(("ranks", "microbatches", "chunks"), [(4, 32, 1), (8, 8, 1), (4, 32, 2), (4, 16, 4)])
def test_bubbles_are_the_formulas(ranks: int, microbatches: int, chunks: int) -> None:
    """(p-1)/m, and (p-1)/(v m) interleaved."""
    name = "interleaved" if chunks > 1 else "1f1b"
    times = [1.0 / chunks] * (ranks * chunks)
    length = pipeline_s(name, ranks, microbatches, chunks, times, [2 * t for t in times], 0.0)
    assert length / (3 * microbatches) - 1 == pytest.approx((ranks - 1) / (chunks * microbatches))


@pytest.mark.parametrize(("name", "chunks"), SCHEDULES)
def test_a_long_step_is_foretold_from_two_short_ones(name: str, chunks: int) -> None:
    chance = random.Random(2)
    forward = [1 + 0.3 * chance.random() for _ in range(4 * chunks)]
    backward = [2 * f for f in forward]
    schedule = make_schedule(name, 4, 64, chunks)
    assert pipeline_s(name, 4, 64, chunks, forward, backward, 0.1) == pytest.approx(
        length_s(schedule, forward, backward, 0.1), rel=0.025)


def test_the_closed_form_of_1f1b_is_near_the_played_step() -> None:
    chance = random.Random(3)
    for _ in range(200):
        ranks = chance.randint(1, 12)
        microbatches = chance.randint(4 * ranks, 80)
        spread, message = chance.choice([0, 0.2, 0.5]), chance.choice([0, 0.05, 0.3, 1])
        forward = [1 + spread * chance.random() for _ in range(ranks)]
        backward = [2 * f for f in forward]
        played = length_s(make_schedule("1f1b", ranks, microbatches), forward, backward, message)
        assert steady_step_s(forward, backward, microbatches, message) == pytest.approx(played, rel=0.05)


def test_equal_stages_have_the_closed_form_exactly() -> None:
    for ranks, microbatches in ((1, 5), (4, 4), (4, 40), (38, 480)):
        length = steady_step_s([1.0] * ranks, [2.0] * ranks, microbatches, 0.0)
        assert length == pytest.approx(3 * (microbatches + ranks - 1))


def test_yuans_bubble_is_7_7_per_cent() -> None:
    length = pipeline_s("1f1b", 38, 480, 1, [1.0] * 38, [2.0] * 38, 0.0)
    assert length / (3 * 480) - 1 == pytest.approx(37 / 480)
    assert length / (3 * 480) - 1 == pytest.approx(0.077, abs=5e-4)
    assert 1 - 3 * 480 / length == pytest.approx(37 / (480 + 37))  # share of the total


@pytest.mark.parametrize(("name", "chunks"), SCHEDULES)
@pytest.mark.parametrize("microbatches", [8, 40])
def test_what_is_held_is_what_the_schedule_holds(name: str, chunks: int, microbatches: int) -> None:
    orders = make_schedule(name, 4, microbatches, chunks).orders
    assert held(name, 4, microbatches, chunks) == pytest.approx([in_flight(o) / chunks for o in orders])


def test_interleaving_holds_the_published_factor() -> None:
    """1 + (p-1)/(p v) times l layers' worth. Source: Korthikanti et al. 2022, section 4.2.3."""
    assert held("interleaved", 8, 64, 3)[0] / 8 == pytest.approx(1 + 7 / (8 * 3))


def test_half_speed_stage_sets_the_pace() -> None:
    even = pipeline_s("1f1b", 4, 64, 1, [1.0] * 4, [2.0] * 4, 0.0)
    uneven = pipeline_s("1f1b", 4, 64, 1, [1.0, 1.0, 2.0, 1.0], [2.0, 2.0, 4.0, 2.0], 0.0)
    assert uneven / even == pytest.approx(2, rel=0.05)
