import json
import os
import subprocess
from pathlib import Path

import pytest

import hpcpar
from hpcpar.config.job import Job
from hpcpar.config.load import load_job, override
from hpcpar.config.run_folder import RunFolder
from hpcpar.errors import UserError
from hpcpar.planner.plan import make_plan
from hpcpar.submit import ask
from hpcpar.submit.preflight import check
from hpcpar.submit.spec import fewest_nodes, for_fewer_nodes, resolve_for_nodes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # no Slurm answers
    return RunFolder(tmp_path)


def job(**submit):
    return resolve_for_nodes(override(Job(), machine={"nodes": 2, "gpus_per_node": 8},
                                      checkpoint={"every": 100}, submit=submit))


def measured(folder, step_s):
    folder.metrics.write_text("".join(json.dumps({"step": n, "step_s": step_s}) + "\n" for n in range(9)))


def test_without_slurm_and_without_figures_nothing_is_refused(folder):
    assert check(job(), folder) == []


@pytest.mark.parametrize(("step_s", "minutes", "said"), [
    (20.0, 30, r"30 minutes do not hold a start \(2m00s\), one checkpoint interval \(100 steps of 20.0 s\) and the "
               r"stop before the end \(3m00s\); write walltime_min = 47"),
    (40.0, 5, r"a step takes 40.0 s, but the signal comes only 1m00s before the end"),
    (400.0, 1440, r"a step takes 6m40s, but the signal comes only 10m00s before the end"),
])
def test_a_time_limit_that_cannot_hold_the_run_is_refused(folder, step_s, minutes, said):
    measured(folder, step_s)
    with pytest.raises(UserError, match=r"submit.walltime_min: " + said):
        check(job(walltime_min=minutes), folder)


def test_the_time_limit_that_is_named_would_do(folder):
    measured(folder, 20.0)
    with pytest.raises(UserError) as refusal:
        check(job(walltime_min=30), folder)
    minutes = int(refusal.value.fix.partition(",")[0].rpartition(" ")[2])
    assert "starts of" in check(job(walltime_min=minutes), folder)[0]


@pytest.mark.parametrize("line", ["export HF_TOKEN=hf_x", "WANDB_API_KEY='abc' true", "export DB_PASSWORD=x"])
def test_a_secret_in_the_job_is_refused(folder, line):
    with pytest.raises(UserError, match="would be kept in the run folder"):
        check(job(setup=("module load x", line)), folder)
    assert check(job(setup=("export TOKENIZERS_PARALLELISM=", "module load tokens")), folder) == []


@pytest.mark.parametrize(("text", "minutes"), [("10:00:00", 600), ("2-01:30:00", 2970), ("UNLIMITED", None),
                                               ("", None)])
def test_slurms_times(text, minutes):
    assert ask.minutes(text) == minutes


@pytest.mark.parametrize(("gres", "gpus"), [
    ("gpu:8", 8), ("gpu:a100:4(S:0-1)", 4), ("gpu:a100:2,gpu:h100:6", 8), ("(null)", 0), ("nvme:1", 0)])
def test_slurms_gres(gres, gpus):
    assert ask._gpus(gres) == gpus


def test_a_slurm_that_hangs_is_none(tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text("#!/bin/sh\nsleep 60\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(ask, "TIMEOUT_S", 0.2)
    assert ask.partitions() is None and ask.max_array_size() == 1001
    with pytest.raises(subprocess.TimeoutExpired):  # it would have hung
        subprocess.run(["scontrol"], timeout=0.2, check=False)


def yuan(**layout):
    wish = load_job(Path(hpcpar.__file__).parent.parent / "jobs/yuan-245b.toml", ["--submit.walltime_min", "1440"])
    return resolve_for_nodes(override(wish, layout=layout))


def test_what_does_not_fit_is_refused_with_changes_that_do(folder):
    tight = override(yuan(recompute="none", pp=19, dp=14), train={"microbatch": 4})
    assert "starts of 1d00h" in check(yuan(), folder)[0]
    with pytest.raises(UserError, match=r"machine.gpu: a rank of stage \d+ needs \d+\.\d GiB at dp 14") as no:
        check(tight, folder)
    assert "--layout.recompute full: " in no.value.fix
    assert check(override(tight, layout={"recompute": "full"}), folder)


def test_the_planners_step_is_held_against_the_time_limit(folder):
    with pytest.raises(UserError, match=r"a step takes \d+\.\d s, but the signal comes only 30.0 s before the end"):
        check(override(yuan(), submit={"walltime_min": 1}), folder)
    measured(folder, 1.0)  # what was seen is stronger than what was foretold
    assert "starts of" in check(override(yuan(), submit={"walltime_min": 30}), folder)[0]


def test_an_elastic_job_must_fit_at_its_smallest_dp(folder):
    elastic = override(yuan(), submit={"elastic": True})
    full, smallest = (make_plan(job).memory[0].total / 2**30
                      for job in (elastic, for_fewer_nodes(elastic, fewest_nodes(elastic))))
    between = folder.path / "gpu.toml"
    between.write_text(f'base = "a100-80g"\n[chip]\nreserved_gib = 0.0\nmemory_gib = {(full + smallest) / 2}\n')
    assert check(override(yuan(), machine={"gpu": str(between)}), folder)
    with pytest.raises(UserError, match="at dp 4"):
        check(override(elastic, machine={"gpu": str(between)}), folder)
