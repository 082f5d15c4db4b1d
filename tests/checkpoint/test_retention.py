from pathlib import Path

import pytest

from hpcpar.checkpoint import published_sets, retire
from tests.checkpoint.sets import GPT, make_layout, save


def steps(folder: Path) -> list[int]:
    return [int(path.name[-4:]) for path in published_sets(folder)]


def test_every_kth_set_stays_for_good_and_does_not_count(tmp_path: Path) -> None:
    layout = make_layout(GPT)
    for step in (10, 20, 30, 40, 50, 60, 70):
        save(tmp_path, step, layout, keep=2, keep_every=30)
    assert steps(tmp_path) == [30, 50, 60, 70]
    assert retire(tmp_path, 70, 0, 30) == []
    assert [path.name for path in retire(tmp_path, 60, 1)] == ["step-00000030", "step-00000050"]
    assert steps(tmp_path) == [60, 70]


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_nothing_is_deleted_while_the_newest_set_is_not_whole(tmp_path: Path, damage: str,
                                                              caplog: pytest.LogCaptureFixture) -> None:
    layout = make_layout(GPT)
    for step in (1, 2, 3):
        save(tmp_path, step, layout)
    shard = tmp_path / "step-00000003" / "shard-00000.h5"
    whole = shard.read_bytes()
    shard.unlink()
    if damage == "cut":
        shard.write_bytes(whole[:-1])
    assert retire(tmp_path, 3, 1) == [] and steps(tmp_path) == [1, 2, 3]
    assert "older sets stay" in caplog.text and "shard-00000.h5" in caplog.text
    shard.write_bytes(whole)
    retire(tmp_path, 3, 1)
    assert steps(tmp_path) == [3]
