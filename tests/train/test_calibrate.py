"""The command measures this machine, and the planner and the trainer go by what it wrote."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from hpcpar import cli
from hpcpar.config.load import to_toml
from hpcpar.planner.hardware import load_machine
from hpcpar.train import calibrate
from hpcpar.units import format_seconds
from tests.train.small import make_job, make_store


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure for a moment: what comes out is rough, but goes all the way."""
    monkeypatch.setattr(calibrate, "WINDOW_S", 0.002)


def test_one_process_measures_plans_and_trains_by_it(hurried: None, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "machine.toml"
    assert cli.main(["calibrate", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"next: hpcpar plan JOB --machine.gpu {path}" in said
    machine = load_machine(str(path))
    assert machine.chip.cores >= 1
    assert machine.inside == dataclasses.replace(load_machine("cpu").inside, devices=1)  # alone, no link was measured
    assert "hpcpar calibrate" in machine.source[0]
    job = tmp_path / "job.toml"
    job.write_text(to_toml(make_job(make_store(tmp_path), train={"precision": "fp32"}, machine={"gpu": str(path)})))
    assert cli.main(["plan", str(job), "--json", "--layout.dp", "1", "--machine.gpus_per_node", "1"]) == 0
    foretold = json.loads(capsys.readouterr().out)["step_s"]
    assert cli.main(["train", str(job), "--run", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(line for line in lines if line.startswith("foretold for"))
    last = next(line for line in lines if line.startswith("a step:"))
    assert f"{format_seconds(foretold)} a step" in first
    assert f"{format_seconds(foretold)} foretold" in last
    assert "the fullest rank:" in last and str(path) in last


def test_training_on_an_unknown_machine_is_not_foretold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "job.toml"
    job.write_text(to_toml(make_job(make_store(tmp_path), machine={"gpu": "our-gpu"})))
    assert cli.main(["train", str(job), "--run", str(tmp_path / "run"), "--layout.dp", "1"]) == 0
    said = capsys.readouterr().out
    assert "not foretold: machine.gpu: our-gpu is no known machine" in said
    assert "a step:" not in said


@pytest.mark.parametrize(("out", "said"), [
    ("machine.txt", "does not end in .toml"), ("nowhere/machine.toml", "mkdir -p"), ("taken.toml", "cannot be written"),
    ("job.toml", "is there, and is no machine TOML"),
])
def test_a_bad_path_is_refused_before_anything_is_measured(out: str, said: str, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken.toml").mkdir()
    (tmp_path / "job.toml").write_text("[model]\nlayers = 2\n")
    assert cli.main(["calibrate", str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert (tmp_path / "job.toml").read_text() == "[model]\nlayers = 2\n"
