"""Which nodes the prologue leaves out, and why: made-up reports of 16 nodes, one of them bad."""

from typing import Any

import pytest

from hpcpar.planner.hardware import load_machine
from hpcpar.probe import measure, partners
from hpcpar.submit.health import Wanted, judge, read_reports

A100 = Wanted(8, load_machine("a100-80g"))
GOOD = {"memory": 900.0, "room": 400.0, "disk": 1500.0, "devices": 8.0, "matmul": 270.0, "device_memory": 79.2,
        "device_free": 0.99, "clock": 1000.0}


def reports(**bad: Any) -> dict[str, dict[str, Any] | None]:
    """Sixteen good nodes in a ring, of which n5 differs."""
    told: dict[str, dict[str, Any] | None] = {
        f"n{i}": {**GOOD, "links": {f"n{(i - 1) % 16}": 11.0, f"n{(i + 1) % 16}": 11.5}} for i in range(16)}
    told["n5"] = {**(told["n5"] or {}), **bad}
    return told


def test_good_nodes_stay_and_the_figures_are_told() -> None:
    found = judge(reports(), A100)
    assert not found.bad
    assert [line.split(":")[0] for line in found.lines] == ["matmul", "disk", "memory", "clocks", "links"]
    assert "a100-80g gives" in found.lines[0]


@pytest.mark.parametrize(("bad", "said"), [
    ({"devices": 7.0}, "7 of 8 GPUs are there"),
    ({"error": "RuntimeError: CUDA error: uncorrectable ECC error"}, "uncorrectable ECC error"),
    ({"device_memory": 39.4}, "a GPU has 39.4 GiB, a100-80g has more than 72.0"),
    ({"device_free": 0.4}, "another process holds 60% of a GPU's memory"),
    ({"room": 0.3}, "0.30 GiB are free on its own disk"),
    ({"matmul": 170.0}, "matmul 170 TFLOP/s, "),
    ({"disk": 30.0}, "disk 30 MB/s written, 1.5e+03 is usual"),
    ({"memory": 200.0}, "memory 200 GiB free, 900 is usual"),
    ({"clock": 1007.5}, "its clock is +7.5 s off"),
    ({"links": {"n4": 1.0, "n6": 1.2}}, "its links give 1 GB/s to n4, 1.2 GB/s to n6; 11 is usual"),
])
def test_a_bad_node_is_named_with_the_reason(bad: dict[str, Any], said: str) -> None:
    found = judge(reports(**bad), A100)
    assert list(found.bad) == ["n5"] and said in found.bad["n5"], found.bad


def test_one_slow_link_accuses_neither_end() -> None:
    assert not judge(reports(links={"n4": 1.0, "n6": 11.5}), A100).bad


def test_a_node_without_a_word_is_bad_and_none_is_if_all_are_silent() -> None:
    told = reports() | {"n5": None}
    assert judge(told, A100).bad == {"n5": "left no report in 50 s"}
    silent = judge(dict.fromkeys(told), A100)
    assert not silent.bad and "passed over" in silent.lines[0]


def test_where_all_are_slow_the_profile_is_wrong_and_nobody_is_left_out() -> None:
    told = {node: {**(report or {}), "matmul": 100.0} for node, report in reports().items()}
    found = judge(told, A100)
    assert not found.bad and "mend machine.gpu" in found.lines[0]


def test_without_a_profile_a_node_must_have_what_the_others_have() -> None:
    assert list(judge(reports(devices=6.0), Wanted()).bad) == ["n5"]
    assert "clocks and links are not known" in judge({"n1": measure(False)}, Wanted()).lines[-1]


def test_two_clocks_that_differ_accuse_nobody() -> None:
    told = {node: report for node, report in reports(clock=1009.0).items() if node in ("n4", "n5")}
    found = judge(told, A100)
    assert not found.bad and "run chrony or ntpd on n4 and n5" in "\n".join(found.lines)


def test_a_report_cut_off_is_none(tmp_path: Any) -> None:
    (tmp_path / "n1.json").write_text('{"disk": 1')
    (tmp_path / "n2.json").write_text('{"disk": 1}')
    assert read_reports(tmp_path, ["n1", "n2", "n3"]) == {"n1": None, "n2": {"disk": 1}, "n3": None}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 266])
def test_each_pair_of_neighbours_meets_once(size: int) -> None:
    rounds = list(zip(*(partners(rank, size) for rank in range(size)), strict=True))
    met = [frozenset((rank, other)) for each in rounds for rank, other in enumerate(each) if other is not None]
    assert all(each[other] == rank for each in rounds for rank, other in enumerate(each) if other is not None)
    ring = {frozenset((rank, (rank + 1) % size)) for rank in range(size)} if size > 1 else set()
    assert set(met) == ring and len(met) == 2 * len(ring)
