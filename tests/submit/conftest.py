import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hpcpar

JOB = """
[model]
layers = 2
hidden = 64
heads = 2
[layout]
tp = 2
[train]
global_batch = 4
[machine]
gpu = "cpu"
nodes = 2
gpus_per_node = 2
[submit]
walltime_min = 5
setup = ["export FROM_SETUP=yes"]
"""

# Stands in for the door: says who and where it is, and leaves with the code that the run folder asks for.
CLI = """
import json, os, pathlib, sys
def main(words):
    from mpi4py import MPI
    run = pathlib.Path(words[words.index("--run") + 1])
    world = MPI.COMM_WORLD.allgather(MPI.COMM_WORLD.rank)
    told = dict(words=words, world=world, file=__file__, environment=dict(os.environ), torch="torch" in sys.modules)
    (run / f"told-{MPI.COMM_WORLD.rank}.json").write_text(json.dumps(told))
    code = run / "code"
    return int(code.read_text()) if code.exists() else 0
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the package with a light door."""
    package = tmp_path / "source" / "hpcpar"
    shutil.copytree(Path(hpcpar.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "cli.py").write_text(CLI)
    return package


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(JOB)
    return path


@pytest.fixture
def python(tmp_path: Path, source: Path):
    """Run Python text with the copied package, in a shell that another job has left its variables in."""

    def run(text: str, **environment: str) -> str:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PMI_", "SBATCH_"))}
        # to files: a local job outlives its submission, and would keep a pipe open
        out, err = tmp_path / "out.txt", tmp_path / "err.txt"
        with out.open("w") as stdout, err.open("w") as stderr:
            whole = {**clean, "PYTHONPATH": str(source.parent), **environment}
            code = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, stdout=stdout, stderr=stderr, timeout=60,
                                  env=whole, check=False).returncode
        assert code == 0, err.read_text()
        return out.read_text()

    return run
