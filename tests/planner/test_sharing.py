"""Ranks that share cores: a wait leaves them to the others, and all the work is done by them."""

from __future__ import annotations

import dataclasses

import pytest

from hpcpar.layout.schedule import make_schedule
from hpcpar.planner.hardware import load_machine
from hpcpar.planner.sharing import Node, as_rank_sees, parts, shared_length_s
from hpcpar.planner.step import Pricing
from hpcpar.planner.timeline import length_s
from tests.planner.jobs import job_of

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1), ("zbv", 2)]


@pytest.mark.parametrize(("name", "chunks"), SCHEDULES)
def test_a_core_for_each_rank_is_the_plain_pipeline(name: str, chunks: int) -> None:
    schedule = make_schedule(name, 4, 8, chunks)
    forward = [1.0 + 0.1 * c for c in range(4 * chunks)]
    backward = [2 * f for f in forward]
    assert shared_length_s(schedule, forward, backward, 1, Node(4, 4)) == pytest.approx(
        length_s(schedule, forward, backward, 0.0))


@pytest.mark.parametrize(("name", "chunks"), SCHEDULES)
def test_one_core_does_all_the_work_and_knows_no_bubble(name: str, chunks: int) -> None:
    schedule = make_schedule(name, 4, 8, chunks)
    forward = [1.0] * (4 * chunks)
    length = shared_length_s(schedule, forward, [2.0] * (4 * chunks), 1, Node(4, 1))
    assert length == pytest.approx(8 * 4 * chunks * 3)


def test_two_cores_under_eight_ranks_lie_between() -> None:
    schedule = make_schedule("1f1b", 4, 8, 1)
    length = shared_length_s(schedule, [1.0] * 4, [2.0] * 4, 2, Node(8, 2))
    work = 8 * 8 * 3 / 2  # ranks x microbatches x times, on two cores
    assert work <= length * (1 + 1e-9) < 1.2 * work


def test_a_heavy_last_stage_that_goes_first_leaves_less_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits make it take twice as long as the others: with equal parts it would be done last."""
    schedule, forward, backward = make_schedule("1f1b", 8, 8), [1.0] * 7 + [3.0], [2.0] * 7 + [3.6]
    work = 8 * (sum(forward) + sum(backward)) / 2
    length = shared_length_s(schedule, forward, backward, 1, Node(8, 2))
    monkeypatch.setattr("hpcpar.planner.sharing.nice_levels", lambda chunk_ranks: [0] * len(chunk_ranks))
    assert 1.0 < length / work < 1.03
    assert shared_length_s(schedule, forward, backward, 1, Node(8, 2)) / work > 1.05


def test_cores_are_divided_by_weight_but_a_rank_takes_no_more_than_one() -> None:
    assert parts([1, 1, 1, 1], 2) == [0.5] * 4
    assert parts([1, 3], 1) == [0.25, 0.75]
    assert parts([1, 1, 5], 2) == [0.5, 0.5, 1.0]
    assert parts([1, 8], 2) == [1.0, 1.0]


def test_a_rank_sees_its_threads_and_its_part_of_the_memory() -> None:
    chip = dataclasses.replace(load_machine("cpu").chip, cores=8, memory_gib=64.0)
    machine = dataclasses.replace(load_machine("cpu"), chip=chip)
    seen = as_rank_sees(machine, Node(2, 8))
    assert (Node(2, 8).threads, Node(2, 8).crowd) == (4, 1.0)
    assert seen.peak_tflops.fp32 == 4 * machine.peak_tflops.fp32
    assert (seen.chip.memory_gib, seen.chip.gb_per_s) == (32.0, 4 * chip.gb_per_s)
    assert (Node(16, 8).threads, Node(16, 8).crowd) == (1, 2.0)
    assert as_rank_sees(load_machine("a100-80g"), Node(8, 0)) is load_machine("a100-80g")


def test_more_ranks_on_the_same_cores_are_no_quicker(tmp_path: object) -> None:
    """dp 8 on two cores takes as long as dp 2, and its exchanges on top; parts add up to the step."""
    chip = dataclasses.replace(load_machine("cpu").chip, cores=2)
    machine = dataclasses.replace(load_machine("cpu"), chip=chip)
    steps = {dp: Pricing(job_of(4, 256, 4, 1, 1, dp, 64, train={"precision": "fp32"}), machine).step() for dp in (2, 8)}
    assert 1.0 <= steps[8].total / steps[2].total < 1.3
    assert sum(steps[8].parts.values()) == pytest.approx(steps[8].total)
