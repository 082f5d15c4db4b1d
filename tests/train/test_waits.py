"""Waits are cut by step and axis."""

from __future__ import annotations

from hpcpar.train.waits import Waits, mean_of, shares


def test_each_step_has_its_own_seconds() -> None:
    groups, text = {"tp": 1.0, "pp_forward": 2.0}, [0.0]
    waits = Waits(lambda: dict(groups), lambda: text[0])
    groups.update(tp=1.5, pp_forward=3.0, pp_backward=0.25, dp=4.0, everyone=0.5, control=0.5)
    text[0] = 0.125
    assert waits.since() == {"text": 0.125, "tp": 0.5, "pp": 1.25, "dp": 4.0, "all": 1.0}
    groups["dp"] = 5.0
    assert waits.since() == {"text": 0.0, "tp": 0.0, "pp": 0.0, "dp": 1.0, "all": 0.0}


def test_a_rank_that_never_waited_counts_in_the_mean() -> None:
    assert mean_of([{"tp": 1.0, "text": 0.5}, {"text": 0.5}]) == {"text": 0.5, "tp": 0.5}


def test_small_shares_are_not_told() -> None:
    assert shares({"tp": 0.12, "pp": 0.0099, "dp": 0.01}, 1.0) == "tp 12% dp 1%"
    assert shares({"text": 0.0}, 1.0) == ""
