"""Whole runs as a user starts them: alone, under mpirun, and wrongly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hpcpar import cli
from hpcpar.config.load import to_toml
from hpcpar.config.run_folder import read_lines
from hpcpar.data.sampler import SampleOrder
from hpcpar.data.store import TokenStore
from tests.train.small import make_job, make_store


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    store = make_store(folder)
    (folder / "job.toml").write_text(to_toml(make_job(store, train={"precision": "fp32"})))
    return folder


def hpcpar(*words, ranks=0, **settings):
    launch = ["mpirun", "-n", str(ranks)] if ranks else []
    command = [*launch, sys.executable, "-m", "hpcpar.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **settings)


def test_one_process_trains_stops_shows_and_generates(place, capsys):
    run, job = place / "alone", str(place / "job.toml")
    assert cli.main(["train", job, "--run", str(run)]) == 0
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6]
    assert {"step", "tokens", "loss", "grad_norm", "lr", "step_s", "tokens_per_s", "memory_bytes",
            "samples_hash", "waits_s"} <= set(lines[0])
    assert [set(line["waits_s"]) for line in lines if "loss" in line] == [{"text"}] * 6
    assert (run / "checkpoints/step-00000006/manifest.json").exists() and any((run / "tensorboard").iterdir())
    assert cli.main(["show", str(run), "--plot"]) == 0
    assert (run / "loss.png").stat().st_size > 5000 and (run / "timeline.png").stat().st_size > 5000
    capsys.readouterr()
    assert cli.main(["generate", str(run), "rank stage", "--tokens", "8"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("rank stage")
    assert cli.main(["generate", str(run), "rank stage", "--tokens", "8"]) == 0
    assert capsys.readouterr().out == first
    assert cli.main(["train", job, "--run", str(run)]) == 0  # nothing left to do


def test_only_the_first_step_reads_its_text_itself(place, monkeypatch):
    readers, read = [], SampleOrder.tokens

    def counted(order, numbers):
        readers.append(threading.current_thread() is threading.main_thread())
        return read(order, numbers)

    monkeypatch.setattr(SampleOrder, "tokens", counted)
    assert cli.main(["train", str(place / "job.toml"), "--run", str(place / "ahead")]) == 0
    per_step = len(readers) // 6
    assert len(readers) == 6 * per_step and readers.count(True) == per_step


def test_a_folder_without_a_valid_set_is_refused(place, capsys):
    run = place / "broken"
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert cli.main(["train", str(place / "job.toml"), "--run", str(run)]) == 2
    assert "--allow-fresh" in capsys.readouterr().err
    assert cli.main(["train", str(place / "job.toml"), "--run", str(run), "--allow-fresh"]) == 0


def test_a_run_that_ended_before_its_first_set_begins_anew(place, capsys):
    run, command = place / "early", ["train", str(place / "job.toml"), "--run", str(place / "early")]
    assert cli.main(command) == 0
    losses = [line.get("loss") for line in read_lines(run / "metrics.jsonl")]
    shutil.rmtree(run / "checkpoints")
    assert cli.main(command) == 2  # it had sets
    assert "but holds no valid checkpoint set" in capsys.readouterr().err
    unsaved = [line for line in read_lines(run / "metrics.jsonl") if "save_s" not in line]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in unsaved[:2]))
    assert cli.main(command) == 2  # it was done, and so had saved
    start, *_ = (run / "journal.jsonl").read_text().splitlines(keepends=True)
    (run / "journal.jsonl").write_text(start)
    (run / "checkpoints/.step-00000002.tmp").mkdir(parents=True)
    assert cli.main(command) == 0
    assert "no set to go on from: begun anew" in capsys.readouterr().out
    assert [line.get("loss") for line in read_lines(run / "metrics.jsonl")] == losses
    assert [path.name for path in (run / "checkpoints").glob(".*")] == []


def test_a_vocabulary_larger_than_the_models_is_refused(place, capsys):
    assert cli.main(["train", str(place / "job.toml"), "--run", str(place / "x"), "--model.vocab", "100"]) == 2
    error = capsys.readouterr().err
    known = TokenStore.open(place / "store").vocab_size
    assert "model.vocab" in error and f"write vocab = {known}" in error and not (place / "x").exists()


def test_bad_input_under_mpirun_is_one_line(place):
    done = hpcpar("train", place / "job.toml", "--layout.tp", "3", "--run", place / "y", ranks=3)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("hpcpar:")]
    assert said == ["hpcpar: layout.tp: 3 must divide model.heads = 4 and model.ffn = 128; nearest legal: 2 or 4"]
    assert "Traceback" not in done.stderr and not (place / "y").exists()


def test_what_one_rank_cannot_do_at_the_start_ends_all(place):
    (place / "taken/logs/rank-00001.log").mkdir(parents=True)
    done = hpcpar("train", place / "job.toml", "--run", place / "taken", ranks=2)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "rank-00001.log: Is a directory; give a --run folder of yours" in done.stderr
    (place / "torn").mkdir()
    (place / "torn/rewinds.jsonl").mkdir()
    done = hpcpar("train", place / "job.toml", "--run", place / "torn", "--skip-samples", "0:1", ranks=2)
    assert done.returncode == 2 and "rewinds.jsonl" in done.stderr and not (place / "torn/RUNNING").exists()


def test_tasks_that_mpi_does_not_see_end_with_a_hint(place):
    """srun without the right --mpi: each of 4 tasks would train alone."""
    environment = {**os.environ, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}
    for name in ("PMI_SIZE", "PMI_RANK"):
        environment.pop(name, None)
    start = time.monotonic()
    done = hpcpar("train", place / "job.toml", "--run", place / "z", "--layout.dp", "4", env=environment)
    assert done.returncode == 2 and "--mpi=pmi2" in done.stderr and "4 tasks" in done.stderr
    assert time.monotonic() - start < 60


def test_parity_of_a_users_own_job(place):
    done = hpcpar("parity", "--layout.tp", "2", place / "job.toml", "--layout.pp", "2", "3",
                  ranks=4)
    # in fp64, whatever the job's own precision is
    assert done.returncode == 0 and "equal within 1e-10" in done.stdout and ", weights " in done.stdout, done.stderr
    done = hpcpar("parity", place / "job.toml", "1", "--train.precision", "fp32")
    assert done.returncode == 0 and "fp32" in done.stdout and "equal within 1e-05" in done.stdout, done.stderr


@pytest.mark.parametrize("how", ["kill", "raise"])
def test_one_dead_rank_ends_a_training_run_with_one_root_cause(place, how):
    run = place / how
    words = ["train", place / "job.toml", "--run", run, "--layout.tp", "2", "--layout.pp", "2",
             "--train.steps", "100000", "--data.validate_every", "0"]
    command = ["mpirun", "-n", "4", sys.executable, "-m", "hpcpar.cli", *map(str, words)]
    if how == "raise":
        command[4:4] = ["-c", FAULTY]
        command.remove("-m"), command.remove("hpcpar.cli")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        wait_for(lambda: len(read_lines(run / "metrics.jsonl")) > 2)
        if how == "kill":
            os.kill(rank_pid(str(run), 2), signal.SIGKILL)
        start = time.monotonic()
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0 and time.monotonic() - start < 30
    cause = json.loads((run / "failure.json").read_text())
    assert cause["rank"] == 2 and cause["coordinates"]["pp"] == 1 and cause["step"] >= 2
    assert error.lower().count("root cause") == 1
    if how == "raise":
        assert "told to fail" in error


FAULTY = """
import sys
from hpcpar import cli
from hpcpar.parallel.zero import ShardedOptimizer
begin, calls = ShardedOptimizer.begin, [0]
def faulty(self, *told):
    calls[0] += 1
    if calls[0] == 5 and (self.groups.at.pp_rank, self.groups.at.tp_rank) == (1, 0):
        raise ArithmeticError("told to fail")
    begin(self, *told)
ShardedOptimizer.begin = faulty
sys.exit(cli.main(sys.argv[1:]))
"""


def wait_for(true, limit_s=60.0):
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, "the run did not start"
        time.sleep(0.2)


def rank_pid(mark, rank):
    """Find the process of a rank by its command line and environment."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text(errors="replace").split("\0")
            environment = (process / "environ").read_text(errors="replace").split("\0")
        except OSError:
            continue
        told = {f"PMI_RANK={rank}", f"OMPI_COMM_WORLD_RANK={rank}"} & set(environment)
        if mark in command and "hpcpar.cli" in command and told:
            return int(process.name)
    raise AssertionError("no such rank")
