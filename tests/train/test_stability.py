"""What is decided from numbers alone: spikes, samples left out, rewinding, slow ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest

from hpcpar.config.job import Stability
from hpcpar.config.run_folder import RunFolder
from hpcpar.errors import UserError
from hpcpar.layout.mesh import Mesh
from hpcpar.train.rewind import leave_out, parse_samples, rewind
from hpcpar.train.stability import distrust, remember, robust_z
from hpcpar.train.state import Progress
from hpcpar.train.straggler import Stragglers

WISH = Stability(spike=8.0)


@pytest.fixture(autouse=True)
def short_window(monkeypatch):
    monkeypatch.setattr("hpcpar.train.stability.WINDOW", 20)



def seasoned(seed: int = 0) -> Progress:
    """Return a progress that has seen 30 ordinary updates."""
    progress, rng = Progress(), np.random.default_rng(seed)
    for step in range(30):
        loss, norm = 3.0 - 0.01 * step + 0.02 * rng.standard_normal(), math.exp(0.2 * rng.standard_normal())
        remember(WISH, progress, loss, norm)
    return progress


def test_a_spike_is_one_of_loss_or_gradient_norm_and_only_upward() -> None:
    progress = seasoned()
    assert len(progress.recent) == 20
    assert distrust(WISH, progress, 2.7, 1.1) == ""
    assert distrust(WISH, progress, 2.7, 100.0).startswith("gradient norm")
    assert distrust(WISH, progress, 6.0, 1.0).startswith("loss")
    assert distrust(WISH, progress, 0.5, 0.001) == ""
    assert distrust(WISH, progress, math.nan, 1.0) == distrust(WISH, progress, 1.0, math.inf) == "not finite"
    assert distrust(Stability(), progress, 6.0, 100.0) == ""  # off unless asked for


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    progress = seasoned()
    progress.recent = progress.recent[:19]
    assert distrust(WISH, progress, 60.0, 100.0) == ""


def test_ordinary_noise_is_no_spike() -> None:
    """Five thousand ordinary steps: not one is left out."""
    progress, rng = seasoned(), np.random.default_rng(1)
    for _ in range(5000):
        loss, norm = 3.0 + 0.02 * rng.standard_normal(), math.exp(0.2 * rng.standard_normal())
        assert distrust(WISH, progress, loss, norm) == ""
        remember(WISH, progress, loss, norm)


def test_a_window_of_equal_values_has_a_floor() -> None:
    assert robust_z(1.0 + 1e-9, [1.0] * 20) < 1e-3 and robust_z(2.0, [1.0] * 20) > 50


def test_what_is_left_out_moves_all_later_samples() -> None:
    progress = Progress()
    progress.leave_out(10, 12)
    progress.leave_out(3, 5)
    progress.leave_out(5, 6)
    assert progress.left_out == [[3, 6], [10, 12]]
    kept = [n for n in range(20) if not (3 <= n < 6 or 10 <= n < 12)]
    assert progress.sample_numbers(np.arange(len(kept))).tolist() == kept


def sets(folder: RunFolder, *steps: int) -> None:
    from hpcpar.checkpoint.format import Manifest

    for step in steps:
        path = folder.checkpoints / f"step-{step:08d}"
        path.mkdir(parents=True)
        (path / "manifest.json").write_bytes(Manifest(step, {}, {}, (), {}).to_bytes())


def test_rewinding_moves_later_sets_aside_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    sets(folder, 10, 20, 30)
    folder.metrics.write_text('{"step": 30}\n')
    assert "rewound to step 10" in rewind(folder, 10, "80:96")
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == [
        "step-00000010", "step-00000020.aside", "step-00000030.aside"]
    assert (tmp_path / "metrics-rewound-1.jsonl").read_text() == '{"step": 30}\n'
    sets(folder, 20)  # the run goes on, is requeued, and repeats its command line
    assert "obeyed before" in rewind(folder, 10, "80:96")
    assert (folder.checkpoints / "step-00000020").exists()
    progress = Progress(step=10, samples=80)
    leave_out(folder, progress)
    leave_out(folder, progress)
    assert progress.left_out == [[80, 96]] and progress.sample_numbers(np.array([79, 80])).tolist() == [79, 96]


def test_a_rewind_that_cannot_be_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    sets(folder, 10)
    with pytest.raises(UserError, match="no published set of step 20; there are: 10"):
        rewind(folder, 20, None)
    for text in ("5", "9:5", "a:b", ""):
        with pytest.raises(UserError, match="--skip-samples"):
            parse_samples(text)
    folder.rewinds.write_text(json.dumps({"to": None, "skip": [40, 50]}) + "\n")
    with pytest.raises(UserError, match="trained on already"):
        leave_out(folder, Progress(step=10, samples=80))


def reports(slow: dict[int, float], noise: float, mesh: Mesh, num: int = 10, seed: int = 0,
            crowded: Collection[int] = ()) -> list[int]:
    rng, found = np.random.default_rng(seed), []
    stragglers = Stragglers(mesh, crowded)
    for _ in range(num):
        own = np.array([1.0 + rank // (mesh.size // mesh.pp_size) for rank in range(mesh.size)])
        own *= 1 + noise * np.abs(rng.standard_normal(mesh.size))
        if rng.random() < 0.5:
            own[int(rng.integers(mesh.size))] *= 5
        for rank, factor in slow.items():
            own[rank] *= factor
        found += [slow.rank for slow in stragglers.add(own.tolist())]
    return found


@pytest.mark.parametrize("mesh", [Mesh(dp_size=8), Mesh(pp_size=2, dp_size=2, tp_size=2), Mesh(4, 14, 1, 8),
                                  Mesh(pp_size=4, tp_size=2)])
def test_a_rank_ten_percent_slower_is_named_once_within_fifty_steps(mesh: Mesh) -> None:
    """Whatever the stages' own loads, and with a hiccup of some rank in every second report."""
    for seed in range(20):
        assert reports({5: 1.10}, 0.005, mesh, seed=seed) == [5]
        assert reports({}, 0.02, mesh, seed=seed) == []


@pytest.mark.parametrize("mesh", [Mesh(pp_size=8), Mesh(pp_size=4, dp_size=2)], ids=str)
def test_a_stage_with_more_work_is_not_slow(mesh: Mesh) -> None:
    """Stages are alike but for the last, which has the logits; alone in its stage a rank has no peers."""
    stragglers, first = Stragglers(mesh), mesh.size - mesh.size // mesh.pp_size
    own_s = [2.2 if rank >= first else 1.0 for rank in range(mesh.size)]
    assert [stragglers.add(own_s) for _ in range(12)] == [[]] * 12
    assert reports({}, 0.005, mesh) == []
    assert reports({5: 2.0}, 0.005, Mesh(pp_size=8)) == []


def test_where_ranks_share_cores_a_rank_must_be_much_slower() -> None:
    mesh = Mesh(dp_size=8)
    for seed in range(20):
        assert reports({5: 1.25}, 0.005, mesh, seed=seed, crowded=range(8)) == []
        assert reports({5: 1.5}, 0.005, mesh, seed=seed, crowded=range(8)) == [5]
        assert reports({5: 1.25}, 0.005, mesh, seed=seed, crowded=range(4)) == [5]


def test_a_few_milliseconds_a_step_are_no_slow_host() -> None:
    """Rank 0 writes the metrics: in a job of 20 ms a step that alone can be 17% more."""
    for extra_s, named in ((0.004, []), (0.008, [0])):
        stragglers, found = Stragglers(Mesh(dp_size=8)), []
        for _ in range(12):
            found += [slow.rank for slow in stragglers.add([5 * (0.020 + extra_s)] + 7 * [5 * 0.020])]
        assert found == named
