"""The choice of what is recomputed, by the memory that there is."""

from __future__ import annotations

import dataclasses

import pytest

from hpcpar.config.job import Job
from hpcpar.config.load import override
from hpcpar.planner.hardware import Machine, load_machine
from hpcpar.planner.plan import make_plan
from hpcpar.planner.recompute import choose_recompute
from hpcpar.planner.search import SPARE
from tests.planner.jobs import yuan

MODES = ("none", "selective", "full")
AUTO = yuan(layout={"recompute": "auto"})


def needs(mode: str) -> float:
    plan = make_plan(override(AUTO, layout={"recompute": mode}))
    return plan.memory[plan.fullest].total


def machine_with(usable_bytes: float) -> Machine:
    machine = load_machine("a100-80g")
    chip = machine.chip
    spare = chip.memory_gib * 2**30 - chip.usable_bytes
    return dataclasses.replace(machine, chip=dataclasses.replace(chip, memory_gib=(usable_bytes + spare) / 2**30))


@pytest.mark.parametrize("mode", MODES)
def test_as_little_is_recomputed_as_fits(mode: str) -> None:
    just = needs(mode) / (1 - SPARE)
    assert needs("none") > needs("selective") > needs("full")
    assert choose_recompute(AUTO, machine_with(1.001 * just)).layout.recompute == mode
    less = choose_recompute(AUTO, machine_with(0.999 * just)).layout.recompute
    assert less == MODES[min(MODES.index(mode) + 1, 2)]


def test_the_quicker_of_two_that_fit() -> None:
    chosen = choose_recompute(AUTO, machine_with(1e12))
    times = {mode: make_plan(override(AUTO, layout={"recompute": mode})).time.total for mode in MODES}
    assert chosen.layout.recompute == min(times, key=times.__getitem__) == "none"


@pytest.mark.parametrize("mode", MODES)
def test_a_value_that_is_given_stays(mode: str) -> None:
    job: Job = yuan(layout={"recompute": mode})
    assert choose_recompute(job, machine_with(1.0)) is job
