"""`hpcpar doctor`: a look at this machine, and at what lies between the ranks."""

from __future__ import annotations

from typing import Any

import pytest

from hpcpar import cli
from hpcpar.comm.control import Alone
from hpcpar.config.surroundings import Surroundings
from hpcpar.doctor import Finding, _safely, _slowest_link


def test_one_process_is_told_what_the_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    for what in ("python", "torch", "mpi", "hdf5", "gpus", "slurm", "network", "room", "ranks"):
        assert any(line.split()[:2] in (["ok", what], ["FAIL", what]) for line in lines), (what, lines)
    num_failed = sum(line.startswith("FAIL") for line in lines)
    assert sum("fix: " in line for line in lines) == num_failed and code == (3 if num_failed else 0)


def test_the_slowest_link_is_named() -> None:
    class Told(Alone):
        def all_gather(self, value: Any) -> list[Any]:
            return [{"1": 4.0, "2": 4.2}, {"0": 4.1, "2": 0.4}, {"1": 0.5, "0": 4.0}]

    assert str(_slowest_link(Told(), {})).endswith("median 4 GB/s between neighbours over MPI, least 0.4 between "
                                                   "ranks 1 and 2")
    assert _slowest_link(Alone(), {}).found == "one rank: no link"


def test_a_broken_part_is_a_finding_and_not_the_end() -> None:
    def _hdf5(surroundings: Surroundings) -> list[Finding]:
        raise ImportError("libhdf5.so.310: cannot open shared object file")

    (finding,) = _safely(_hdf5, Surroundings("here"))  # type: ignore[arg-type]
    assert finding.what == "hdf5" and "libhdf5" in finding.found and finding.fix
