import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcpar.checkpoint import latest_set, load_tensor, published_sets, read_state, save_set, verify_set
from hpcpar.comm.control import Alone
from tests.checkpoint.sets import GPT, make_layout, on_ranks, reference, save, shards_of, try_save

SAVER = """
import sys
from pathlib import Path
from hpcpar.checkpoint import save_set
from hpcpar.comm.control import Alone
from tests.checkpoint.sets import GPT, make_layout, shards_of
layout = make_layout({**GPT, "hidden": 64})
shards, same = shards_of(layout, 0), sys.argv[3] == "same"
step = int(sys.argv[2])
while True:
    step += 1
    path = save_set(Path(sys.argv[1]), 5 if same else step, layout, 0, Alone(), shards, {"save": step}, keep=3)
    print(step, flush=True)
"""


@pytest.mark.parametrize("mode", ["next", "same"])
def test_a_killed_writer_leaves_the_last_published_set(tmp_path: Path, mode: str) -> None:
    dice, last, told = random.Random(mode), 0, 0
    for _ in range(10):
        child = subprocess.Popen([sys.executable, "-c", SAVER, tmp_path, str(last), mode], stdout=subprocess.PIPE,
                                 text=True)
        child.stdout.readline()
        time.sleep(dice.random() * 0.15)
        child.kill()
        said = child.communicate()[0].split()
        told = int(said[-1]) if said else last + 1
        found = latest_set(tmp_path)
        assert found is not None and len(published_sets(tmp_path)) <= 4
        verify_set(found)
        last = read_state(found)["save"]
        assert last in (told, told + 1)  # the last that the writer told of, or the one it had no time to tell of
    assert (load_tensor(found, "final_norm.weight") == reference("weight", "final_norm.weight", (64,))).all()
    layout = make_layout({**GPT, "hidden": 64})
    save_set(tmp_path, last + 1, layout, 0, Alone(), shards_of(layout, 0), {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == [f"step-{last + 1:08d}"]


def test_a_save_killed_between_its_two_renames(tmp_path: Path) -> None:
    layout = make_layout(GPT)
    path = save(tmp_path, 5, layout)
    aside = tmp_path / ".step-00000005.old"
    path.rename(aside)
    save(tmp_path / "other", 5, layout).rename(tmp_path / ".step-00000005.tmp")
    (tmp_path / "other").rmdir()
    assert latest_set(tmp_path) == aside and verify_set(aside)
    save(tmp_path, 4, layout)
    assert [p.name for p in published_sets(tmp_path)] == ["step-00000004", "step-00000005"]
    assert len(list(tmp_path.iterdir())) == 2


def test_retention(tmp_path: Path) -> None:
    layout = make_layout(GPT, 1, 1, 2)
    for step in (10, 20, 30, 40):
        save(tmp_path, step, layout, keep=0)
    save(tmp_path, 25, layout, keep=2)  # later steps are not older sets
    assert [p.name[-2:] for p in published_sets(tmp_path)] == ["20", "25", "30", "40"]
    save(tmp_path, 50, layout, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000050"]
    save(tmp_path, 50, layout, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000050"] and verify_set(tmp_path / "step-00000050")


def test_wrong_shards_and_state_fail_on_all_ranks(tmp_path: Path) -> None:
    layout = make_layout(GPT, 1, 1, 2)
    good = shards_of(layout, 0)
    cases = [({**good, "weight": good["weight"][:-1]}, {}, "ValueError: shards of weight"),
             (good, {"loss": float("nan")}, "ValueError"), (good, {"path": Path()}, "TypeError"),
             ({"weight": good["weight"]}, {}, "rank 1 has kinds")]
    for shards, state, words in cases:
        results = on_ranks(2, lambda c, s=shards, t=state: save_set(
            tmp_path, 1, layout, c.rank, c, s if c.rank == 0 else shards_of(layout, 1), t))
        assert all(words in str(r) for r in results), results
    assert [p.name for p in tmp_path.iterdir()] == []
    assert all(isinstance(r, Path) for r in try_save(tmp_path, 1, layout))
