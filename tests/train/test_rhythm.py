import math

import pytest

from hpcpar.train.rhythm import FIRST_STEPS, Rhythm, best_interval_s


def test_youngs_interval_loses_less_than_its_neighbours() -> None:
    cost_s, mtbf_s = 12.0, 3 * 3600.0

    def lost(interval_s: float) -> float:  # saves, and half an interval a failure, a second of the run
        return cost_s / interval_s + interval_s / 2 / mtbf_s

    best = best_interval_s(cost_s, mtbf_s)
    assert lost(best) < min(lost(best * 0.9), lost(best * 1.1))


def test_a_save_costs_its_stall_and_the_slower_steps_beside_it() -> None:
    rhythm = Rhythm(start_step=40, mtbf_s=5000.0)
    assert rhythm.next_step == 40 + FIRST_STEPS
    for step_s in (9.0, 1.0, 1.0, 1.0, 1.0):  # the first one compiles
        rhythm.step(step_s, saving=False)
    for step_s in (1.5, 1.0, 1.25):
        rhythm.step(step_s, saving=True)
    assert rhythm.cost_s(0.25) == pytest.approx(1.0)
    assert rhythm.steps_between(0.25, save_s=3.0) == round(math.sqrt(2 * 1.0 * 5000.0))
    assert rhythm.cost_s(0.25) == 0.25  # the next one is measured afresh
    assert rhythm.steps_between(0.0001, save_s=30.0) == 30  # never less than a save takes
    rhythm.wait(50, 100)
    assert rhythm.next_step == 150
    rhythm.wait(150)  # a failed save: as long again
    assert rhythm.next_step == 250
