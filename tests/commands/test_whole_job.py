"""What a job leaves to the planner is chosen at every door, before anything reads the layout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcpar.checkpoint import latest_set, read_manifest
from hpcpar.cli import main
from hpcpar.config.load import load_job, override, to_toml
from hpcpar.config.resolve import resolve
from hpcpar.planner.plan import make_plan
from hpcpar.planner.search import SPARE
from hpcpar.submit.slurm import Request, submit
from tests.train.small import make_job, make_store


@pytest.fixture
def job(tmp_path: Path) -> str:
    """A job for a machine that just holds it with "full", which is nowhere the default."""
    wish = make_job(make_store(tmp_path), layout={"recompute": "full"}, machine={"gpus_per_node": 1},
                    train={"steps": 2, "precision": "fp32"})
    plan = make_plan(resolve(override(wish, machine={"gpu": "cpu"})))
    gib = 1.001 * plan.memory[plan.fullest].total / (1 - SPARE) / 2**30
    machine, path = tmp_path / "small.toml", tmp_path / "job.toml"
    machine.write_text(f'base = "cpu"\n[chip]\nmemory_gib = {gib}\nreserved_gib = 0.0\n')
    path.write_text(to_toml(override(wish, layout={"recompute": "auto"}, machine={"gpu": str(machine)})))
    assert 'recompute = "auto"' in path.read_text()
    return str(path)


@pytest.mark.parametrize(("words", "says"), [
    (["show"], 'recompute = "full"'),
    (["plan"], "recompute full"),
    (["plan", "--json"], '"fits": true'),
    (["rehearse", "--all"], "match"),
    (["rehearse"], "on shapes only"),
    (["parity", "2"], "equal within"),
])
def test_commands_choose(job: str, words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([words[0], job, *words[1:]]) == 0
    assert says in capsys.readouterr().out


def test_a_run_keeps_the_choice_and_goes_on(job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", job, "--run", str(run)]) == 0
    assert load_job(run / "config.toml").layout.recompute == "full"
    saved = latest_set(run / "checkpoints")
    assert saved is not None and read_manifest(saved).state["job"]["layout"]["recompute"] == "full"
    assert main(["ckpt", "check", job, str(run)]) == 0
    assert "layout.recompute" not in capsys.readouterr().out
    assert main(["train", job, "--run", str(run), "--train.steps", "3"]) == 0  # and on another machine
    assert main(["train", job, "--run", str(run), "--train.steps", "4", "--machine.gpu", "cpu"]) == 0
    assert load_job(run / "config.toml").layout.recompute == "none"


def test_a_submission_keeps_the_choice(job: str, tmp_path: Path) -> None:
    submit(Path(job), [], tmp_path / "run", dict(os.environ), Request(dry_run=True))
    assert load_job(tmp_path / "run/submit/job.toml").layout.recompute == "full"
