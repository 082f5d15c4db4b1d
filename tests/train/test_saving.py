"""What a run makes of its saves: failures are told and counted, and training goes on."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hpcpar import cli
from hpcpar.checkpoint.verify import latest_set, published_sets, verify_set
from hpcpar.comm.bootstrap import World, connect
from hpcpar.config.job import Job
from hpcpar.config.load import to_toml
from hpcpar.config.resolve import resolve
from hpcpar.config.run_folder import RunFolder, read_lines
from hpcpar.config.surroundings import Surroundings
from hpcpar.errors import UserError
from hpcpar.train import preflight
from hpcpar.train.loop import Run, start_run, train
from hpcpar.train.preflight import check_space, open_order, set_bytes
from tests.checkpoint.processes import await_no_writer, writers
from tests.train.small import make_job, make_store

UNLIMITED = resource.RLIM_INFINITY


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("saving"))


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory where there is one: every save syncs."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="hpcpar-", dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.create()
    return run


def run_of(job: Job, folder: RunFolder) -> tuple[Run, World]:
    world = connect(Surroundings("here"))
    torch.set_num_threads(1)  # the writer computes beside it
    job = resolve(job, 1)
    return start_run(job, world, folder, open_order(job), False, lambda action: None), world


def figures(folder: RunFolder, key: str) -> dict[int, Any]:
    return {line["step"]: line[key] for line in read_lines(folder.metrics) if key in line}


@pytest.mark.parametrize("asynchronous", [True, False])
def test_training_goes_on_when_the_disk_is_full(store: Path, folder: RunFolder, asynchronous: bool,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    ten: dict[str, dict[str, object]] = {"train": {"steps": 10}, "data": {"validate_every": 0}}
    job = make_job(store, checkpoint={"every": 2, "asynchronous": asynchronous}, **ten)
    run, _ = run_of(job, folder)

    def limit(num_bytes: int) -> None:
        pid = writers(folder.checkpoints)["rank-00000"] if asynchronous else os.getpid()
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, UNLIMITED))

    def note(step: int = 0, phase: str = "") -> None:
        if step == 3:
            run.saves.finish()  # the set of step 2
            limit(200_000)  # a shard is larger, metrics.jsonl is not
        if phase == "finish" and not asynchronous:  # the writer keeps its limit
            limit(UNLIMITED)

    try:
        assert train(run, note)
    finally:
        resource.prlimit(os.getpid(), resource.RLIMIT_FSIZE, (UNLIMITED, UNLIMITED))
    assert figures(folder, "saves_failed") == {4: 1, 6: 2, 8: 3, 10: 4}
    # the second is what h5py now and then makes of the first, when the limit hits the header in memory
    assert any(said in figures(folder, "save_failed")[4] for said in ("File too large", "the header cannot be written"))
    assert "cannot save step-00000004: rank 0: OSError" in capsys.readouterr().out
    assert len(figures(folder, "loss")) == 10
    # the last one is written by the rank itself, for without it the run would have been in vain
    assert [verify_set(path).step for path in published_sets(folder.checkpoints)] == [2, 10]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-00000002", "step-00000010"]
    whole = RunFolder(folder.path / "whole")
    whole.create()
    assert train(run_of(make_job(store, **ten), whole)[0], lambda **where: None)
    assert figures(whole, "loss") == figures(folder, "loss")


def test_an_automatic_interval_is_measured_and_kept(store: Path, folder: RunFolder,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(store, train={"steps": 60}, checkpoint={"every": "auto", "keep": 0}, machine={"mtbf_h": 0.001},
                   data={"validate_every": 0})
    run, _ = run_of(job, folder)
    assert train(run, lambda **where: None)
    saved = sorted(figures(folder, "save_s"))
    every = [int(n) for n in re.findall(r"the next one is (\d+) steps after this one", capsys.readouterr().out)]
    assert saved[0] == 10 and saved[-1] == 60 and len(every) in (len(saved), len(saved) - 1)
    for one, other, wait in zip(saved, saved[1:], every, strict=False):
        assert other >= min(one + wait, 60)
    assert [verify_set(path).step for path in published_sets(folder.checkpoints)] == saved
    await_no_writer(folder.checkpoints)


def test_no_room_for_the_sets_is_told_before_the_first_step(store: Path, folder: RunFolder, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.toml"
    file.write_text(to_toml(make_job(store, checkpoint={"every": 1})))
    words = ["--run", str(tmp_path / "large"), "--model.layers", "2000", "--model.hidden", "12288"]
    assert cli.main(["train", str(file), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hpcpar: checkpoint.keep: 3 sets, and one more while it is saved, need ") and "GiB" in said
    assert not (tmp_path / "large").exists()

    job = resolve(make_job(store, checkpoint={"every": 1, "keep": 5}), 1)
    one = set_bytes(job)
    for free, fix in ((5.5, "write keep = 4"), (2.1, "write keep = 1"), (1.5, "free space")):
        disk = SimpleNamespace(f_bavail=int(free * one), f_frsize=1)
        monkeypatch.setattr(preflight.os, "statvfs", lambda path, disk=disk: disk)
        with pytest.raises(UserError, match=fix):
            check_space(job, folder)
    check_space(resolve(make_job(store, checkpoint={"every": 1, "keep": 0}), 1), folder)
    check_space(resolve(make_job(store, checkpoint={"every": 0, "keep": 5}), 1), folder)  # it will save once
    for step in (1, 2, 3, 4, 5):
        (folder.checkpoints / f"step-0000000{step}").mkdir()
    check_space(job, folder)  # what is there already counts


def test_the_space_foretold_is_the_space_taken(store: Path, folder: RunFolder) -> None:
    job = resolve(make_job(store, train={"steps": 1}), 1)
    run, _ = run_of(job, folder)
    assert train(run, lambda **where: None)
    taken = sum(path.stat().st_size for path in latest_set(folder.checkpoints).iterdir())
    assert set_bytes(job) < taken < 1.2 * set_bytes(job)


def test_a_killed_run_takes_its_writers_along_and_goes_on(store: Path, tmp_path: Path) -> None:
    file, run = tmp_path / "job.toml", RunFolder(tmp_path / "run")
    file.write_text(to_toml(make_job(store, train={"steps": 100000}, data={"validate_every": 0},
                                     checkpoint={"every": 2, "keep": 2})))
    command = ["mpirun", "-n", "2", sys.executable, "-m", "hpcpar.cli", "train", str(file), "--run", str(run.path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 90
        while len(figures(run, "save_s")) < 2:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        found = writers(run.checkpoints)
        assert set(found) == {"rank-00000", "rank-00001"}
        rank = int(Path(f"/proc/{found['rank-00001']}/stat").read_text().rpartition(")")[2].split()[1])  # its parent
        os.kill(rank, signal.SIGKILL)
        assert process.wait(60) != 0
    finally:
        process.kill()
    await_no_writer(run.checkpoints)
    told = max(figures(run, "save_s"))
    assert verify_set(latest_set(run.checkpoints)).step in (told, told + 2)
    last = verify_set(latest_set(run.checkpoints)).step + 3
    done = subprocess.run([*command, "--train.steps", str(last)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"resumed step-{last - 3:08d}" in done.stdout, done.stderr
    assert verify_set(latest_set(run.checkpoints)).step == last
