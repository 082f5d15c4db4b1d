"""Which nodes the prologue leaves out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hpcpar import probe
from hpcpar.planner.hardware import load_machine
from hpcpar.submit.health import Wanted, judge, read_reports

GPU = {"devices": 8.0, "matmul": 250.0, "device_free": 0.99, "device_memory": 79.0}
CPU = {"devices": 0.0, "matmul": 0.1, "memory": 200.0, "room": 50.0, "disk": 900.0, "clock": 100.0}
ALIKE = Wanted()
A100 = Wanted(8, load_machine("a100-80g"))


def nodes(count: int, links: float = 20.0, **changed: float) -> dict[str, dict[str, Any]]:
    """`count` nodes n0, n1, ... in a ring, all alike."""
    names = [f"n{number}" for number in range(count)]
    return {name: {**CPU, **changed, "links": {names[at - 1]: links, names[(at + 1) % count]: links}}
            for at, name in enumerate(names)}


def bad_of(reports: Mapping[str, Mapping[str, Any] | None], wanted: Wanted = ALIKE) -> dict[str, str]:
    return judge(reports, wanted).bad


def test_equal_nodes_are_all_good() -> None:
    found = judge(nodes(5), ALIKE)
    assert not found.bad
    assert [line.split(":")[0] for line in found.lines] == ["matmul", "disk", "memory", "clocks", "links"]
    assert not bad_of(nodes(5, **GPU), A100)


@pytest.mark.parametrize(("change", "said"), [
    ({"devices": 7.0}, "7 of 8 GPUs are there"),
    ({"matmul": 170.0}, "matmul 170 TFLOP/s, 236 is usual"),
    ({"device_memory": 39.5}, "a GPU has 39.5 GiB"),
    ({"device_free": 0.5}, "another process holds 50% of a GPU's memory"),
    ({"memory": 60.0}, "memory 60 GiB free, 200 is usual"),
    ({"room": 0.5}, "0.50 GiB are free on its own disk"),
    ({"disk": 50.0}, "disk 50 MB/s written, 900 is usual"),
    ({"clock": 107.0}, "its clock is +7.0 s off"),
    ({"error": "RuntimeError: no CUDA driver"}, "no CUDA driver"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_the_bad_one_of_five_is_named_with_the_reason(change: dict[str, Any], said: str) -> None:
    reports = nodes(5, **GPU)
    reports["n3"] |= change
    found = bad_of(reports, A100)
    assert list(found) == ["n3"] and said in found["n3"], found


def test_a_silent_node_is_bad_and_a_silent_job_is_not() -> None:
    assert "left no report" in bad_of({**nodes(3), "n3": None})["n3"]
    assert not bad_of(dict.fromkeys(nodes(3)))


def test_a_slow_link_is_its_own_nodes_fault() -> None:
    reports = nodes(5)
    for at, other in (("n3", "n2"), ("n3", "n4"), ("n2", "n3"), ("n4", "n3")):
        reports[at]["links"][other] = 2.0
    assert list(bad_of(reports)) == ["n3"]
    one = nodes(5)
    one["n3"]["links"]["n4"] = one["n4"]["links"]["n3"] = 2.0  # a cable between two good nodes
    assert not bad_of(one) and any("least 2 at n" in line for line in judge(one, ALIKE).lines)


def test_where_all_are_slow_the_profile_is_wrong() -> None:
    found = judge(nodes(5, **{**GPU, "matmul": 60.0}), A100)
    assert not found.bad and any("all nodes are slower than the profile says" in line for line in found.lines)


def test_two_nodes_cannot_tell_whose_clock_is_wrong() -> None:
    reports = nodes(2)
    reports["n1"]["clock"] = 200.0
    found = judge(reports, ALIKE)
    assert not found.bad and any("cannot tell whose is wrong" in line for line in found.lines)


@pytest.mark.parametrize("size", range(1, 12))
def test_every_pair_of_neighbours_meets_once(size: int) -> None:
    rounds = [probe.partners(rank, size) for rank in range(size)]
    met = []
    for step in range(3):
        pairs = {(rank, rounds[rank][step]) for rank in range(size) if rounds[rank][step] is not None}
        assert all((b, a) in pairs and a != b for a, b in pairs)  # both ends know
        met += [frozenset(pair) for pair in pairs if pair[0] < pair[1]]  # type: ignore[operator]
    wanted = {frozenset((rank, (rank + 1) % size)) for rank in range(size)} if size > 1 else set()
    assert sorted(map(sorted, met)) == sorted(map(sorted, wanted))


def test_a_real_node_leaves_its_report(tmp_path: Path) -> None:
    """Three tasks under MPI, each as if it were a node of its own."""
    code = ("import os, sys; from pathlib import Path; from dataclasses import replace; "
            "from hpcpar import probe; from hpcpar.config.surroundings import Surroundings; "
            "found = Surroundings.read(os.environ); "
            "probe.main(Path(sys.argv[1]), replace(found, node='n' + os.environ['PMI_RANK']))")
    subprocess.run(["mpirun", "-n", "3", sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    reports = read_reports(tmp_path, ["n0", "n1", "n2", "n3"])
    assert reports.pop("n3") is None
    for report in reports.values():
        assert report is not None and report["matmul"] > 0 and report["disk"] > 0 and len(report["links"]) == 2
    assert sorted(json.loads((tmp_path / "n0.json").read_text())["links"]) == ["n1", "n2"]
