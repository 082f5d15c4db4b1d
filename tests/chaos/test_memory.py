"""A rank is killed with -9 and its node lost: the run goes on from the other node's memory, ahead of the disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hpcpar.checkpoint import latest_set
from hpcpar.comm.bootstrap import connect
from hpcpar.config.load import to_toml
from hpcpar.config.resolve import resolve
from hpcpar.config.run_folder import RunFolder, read_lines
from hpcpar.config.surroundings import Surroundings
from hpcpar.train.loop import start_run, train
from hpcpar.train.preflight import open_order
from tests.checkpoint.processes import await_no_writer
from tests.train.small import make_job, make_store

SCRIPT, ROOT = Path(__file__).with_name("remembering_ranks.py"), Path(__file__).parents[2]


@pytest.fixture
def shared() -> Iterator[Path]:
    """Real shared memory: what is there outlives the ranks."""
    with tempfile.TemporaryDirectory(prefix="hpcpar-test-", dir="/dev/shm") as path:
        yield Path(path)


def losses(run: RunFolder) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_lines(run.metrics) if "loss" in line}


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")
def test_a_killed_rank_and_its_node_come_back_from_the_neighbours_memory(tmp_path: Path, shared: Path) -> None:
    job = make_job(make_store(tmp_path), train={"steps": 12}, data={"validate_every": 0},
                   checkpoint={"every": 4, "asynchronous": "neighbour"})
    (tmp_path / "job.toml").write_text(to_toml(job))
    run = RunFolder(tmp_path / "run")

    def launch(victim: int, *layout: str) -> subprocess.CompletedProcess[str]:
        command = ["mpirun", "-n", "2", sys.executable, str(SCRIPT), str(shared), str(victim), "8", "train",
                   str(tmp_path / "job.toml"), "--run", str(run.path), *layout]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)

    died = launch(1, "--layout.tp", "2")
    assert died.returncode != 0, died.stdout
    on_disk, (place,) = latest_set(run.checkpoints), shared.iterdir()
    assert on_disk is not None and on_disk.name == "step-00000004"
    assert sorted(path.name for path in place.glob("*/step-*")) == ["step-00000008"] * 2
    shutil.rmtree(place / "node1")
    resumed = launch(-1, "--layout.pp", "2")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed step-00000008 from memory" in resumed.stdout
    assert list(shared.iterdir()) == []  # the run has ended well
    found = latest_set(run.checkpoints)
    assert found is not None and found.name == "step-00000012"
    await_no_writer(run.checkpoints)

    whole, alone = RunFolder(tmp_path / "whole"), resolve(job, 1)
    whole.create()
    assert train(start_run(alone, connect(Surroundings("here")), whole, open_order(alone), False, lambda action: None),
                 lambda **where: None)
    assert list(losses(run)) == list(losses(whole)) == list(range(1, 13))
    np.testing.assert_allclose(list(losses(run).values()), list(losses(whole).values()), rtol=1e-12)
