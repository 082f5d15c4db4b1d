"""A sample of `make chaos-checkpoint`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.chaos.kill_saves import campaign, living


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")
@pytest.mark.parametrize(("kills", "mode", "seed"), [(5, (), 7), (2, ("async",), 8)],
                         ids=["synchronous", "asynchronous"])
def test_kill_9_of_a_rank_all_ranks_or_the_launcher_leaves_the_last_published_set(
        tmp_path: Path, kills: int, mode: tuple[str, ...], seed: int) -> None:
    left = campaign(tmp_path / "sets", kills, seed, *mode)
    assert sum(left.values()) == kills and living(tmp_path / "sets") == []
