"""A sample of `make chaos`: a death and a full disk, in one run of 4 ranks that goes on from each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.chaos.campaign import EVERY, FAULTS, play, table

SAMPLE = ("kill", "disk")


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")
def test_nothing_is_lost_beyond_the_last_set_and_the_verdict_is_right(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    play(tmp_path, [FAULTS.index(fault) for fault in SAMPLE], 10, out, reference_steps=4 * EVERY, num_ranks=4)
    outcomes = [json.loads(line) for line in out.read_text().splitlines()]
    assert [outcome["fault"] for outcome in outcomes] == list(SAMPLE)
    assert not [outcome for outcome in outcomes if outcome["wrong"]], table(outcomes)
