"""`hpcpar doctor`: a look at this machine, and who falls behind."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hpcpar import cli
from hpcpar.config.surroundings import Surroundings
from hpcpar.doctor import Finding, _safely


def test_one_process_is_told_what_the_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    for what in ("python", "torch", "mpi", "hdf5", "gpus", "slurm", "network", "room", "ranks"):
        assert any(line.split()[:2] in (["ok", what], ["FAIL", what]) for line in lines), (what, lines)
    num_failed = sum(line.startswith("FAIL") for line in lines)
    assert sum("fix: " in line for line in lines) == num_failed and code == (3 if num_failed else 0)


def test_ranks_measure_their_links_and_their_hosts() -> None:
    """Three ranks under MPI; who falls behind is judged as in a job's prologue (tests/submit/test_health.py)."""
    told = {}
    for words in (["doctor"], ["doctor", "node"]):
        done = subprocess.run(["mpirun", "-n", "3", sys.executable, "-m", "hpcpar.cli", *words], text=True,
                              capture_output=True, timeout=60, check=False)
        told[len(words)] = [line.split()[:2] for line in done.stdout.splitlines()]
    assert ["ok", "all-reduce"] in told[1] and ["ok", "links"] in told[1], told
    assert ["ok", "matmul"] in told[2] and ["ok", "disk"] in told[2] and ["ok", "memory"] in told[2], told


def test_a_broken_part_is_a_finding_and_not_the_end() -> None:
    def _hdf5(surroundings: Surroundings) -> list[Finding]:
        raise ImportError("libhdf5.so.310: cannot open shared object file")

    (finding,) = _safely(_hdf5, Surroundings("here"))  # type: ignore[arg-type]
    assert finding.what == "hdf5" and "libhdf5" in finding.found and finding.fix
