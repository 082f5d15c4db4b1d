"""`hpcpar doctor`: a look at this machine, and who falls behind."""

from __future__ import annotations

import pytest

from hpcpar import cli
from hpcpar.config.surroundings import Surroundings
from hpcpar.doctor import Finding, _safely, fallen_behind


def test_one_process_is_told_what_the_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    for what in ("python", "torch", "mpi", "hdf5", "gpus", "slurm", "network", "room", "ranks"):
        assert any(line.split()[:2] in (["ok", what], ["FAIL", what]) for line in lines), (what, lines)
    num_failed = sum(line.startswith("FAIL") for line in lines)
    assert sum("fix: " in line for line in lines) == num_failed and code == (3 if num_failed else 0)


def test_the_slow_host_is_named_and_can_be_left_out() -> None:
    good = {"matmul": 100.0, "memory": 1000.0, "disk": 500.0, "room": 70.0}
    told = [(f"node{rank // 8}", dict(good)) for rank in range(32)]
    assert not [finding for finding in fallen_behind(told) if finding.fix]
    told[19][1]["matmul"] = 70.0
    told[30][1]["room"] = 3.0
    bad = {finding.what: finding.fix for finding in fallen_behind(told) if finding.fix}
    assert bad == {"matmul": "leave out node2 (70): --exclude=node2", "room": "leave out node3 (3): --exclude=node3"}


def test_a_broken_part_is_a_finding_and_not_the_end() -> None:
    def _hdf5(surroundings: Surroundings) -> list[Finding]:
        raise ImportError("libhdf5.so.310: cannot open shared object file")

    (finding,) = _safely(_hdf5, Surroundings("here"))  # type: ignore[arg-type]
    assert finding.what == "hdf5" and "libhdf5" in finding.found and finding.fix
