"""Activations that wait in the host's memory, on paper: bytes here and there, and seconds that copies add."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hpcpar.config.load import override
from hpcpar.config.run_folder import RunFolder
from hpcpar.errors import UserError
from hpcpar.planner.compute import layer_time
from hpcpar.planner.hardware import Host, Machine, load_machine, machine_toml
from hpcpar.planner.memory import layer_bytes
from hpcpar.planner.plan import Plan, make_plan
from hpcpar.planner.report import describe_plan
from hpcpar.planner.unequal import share_out
from hpcpar.submit.preflight import check
from tests.planner.jobs import job_of, yuan

A100 = load_machine("a100-80g")
OFFLOAD = {"recompute": "offload"}


def with_host(gb_per_s: float, share_gib: float = 0.0) -> Machine:
    return dataclasses.replace(A100, host=Host(gb_per_s, 1.0, share_gib))


def on_one_gpu(recompute: str, machine: Machine | None = None) -> Plan:
    return make_plan(job_of(8, 2048, 16, 1, 1, 1, 4, layout={"recompute": recompute}), machine)


@pytest.mark.parametrize("stage", [0, 3, 6])
def test_two_layers_are_here_and_what_is_in_flight_is_there(stage: int) -> None:
    job = job_of(76, 16384, 128, 8, 19, 14, 3360, layout=OFFLOAD)
    plan, kept = make_plan(job), layer_bytes(job, "none")
    in_flight, layers = 19 - stage, 4
    inputs = 0 if stage == 0 else 2 * 2048 * 16384 / 8  # of the stage: the pipeline holds them
    assert plan.pricing.rank_host_bytes(stage) == in_flight * (layers * kept - inputs)
    assert plan.pricing.host_bytes == plan.pricing.rank_host_bytes(0)
    none = make_plan(override(job, layout={"recompute": "none"}))
    gone = none.memory[stage].activations - plan.memory[stage].activations
    assert gone == pytest.approx((in_flight * layers - 2) * kept - in_flight * inputs)


def test_where_ranks_are_cores_nothing_is_won() -> None:
    job = job_of(8, 256, 8, 2, 2, 2, 8, model={"seq": 64}, layout=OFFLOAD, machine={"gpu": "cpu"})
    none, offload = make_plan(override(job, layout={"recompute": "none"})), make_plan(job)
    assert offload.pricing.host_bytes == 0
    assert offload.memory[0].activations - none.memory[0].activations == pytest.approx(2 * layer_bytes(job, "none"))
    assert offload.time.total > none.time.total


def test_a_quick_link_costs_nothing_and_a_slow_one_what_computing_does_not_hide() -> None:
    none = on_one_gpu("none")
    assert on_one_gpu("offload", with_host(1e6)).time.total == none.time.total
    slow = on_one_gpu("offload", with_host(1.0))
    kept = layer_bytes(slow.job, "none")
    layers, microbatches, copy = 8, 4, kept / 1e9
    layer = layer_time(none.pricing.cut, none.pricing.machine, none.pricing.practice, "none")
    each = 2 * copy - layer.forward.total - layer.backward.total
    assert slow.time.parts["host"] == pytest.approx(microbatches * (layers - 1) * each)  # the last one stays
    assert slow.time.total == pytest.approx(none.time.total + slow.time.parts["host"])
    assert slow.hardware_flops == none.hardware_flops


@pytest.mark.parametrize(("schedule", "last"), [("1f1b", 0), ("gpipe", 1)])
def test_a_stages_last_layer_leaves_and_comes_back_beside_nothing(schedule: str, last: int) -> None:
    """Unless its backward follows its forward at once, as in 1F1B's last stage."""
    job = job_of(8, 2048, 16, 1, 4, 1, 4, layout={**OFFLOAD, "schedule": schedule})
    machine = with_host(100.0)
    copy = layer_bytes(job, "none") / 100e9
    backwards = [chunk.backward.host for chunk in make_plan(job, machine).pricing.chunks]
    assert backwards == pytest.approx([copy] * 3 + [last * copy])


def test_it_costs_less_than_recomputing_where_the_link_is_quick() -> None:
    times = {mode: on_one_gpu(mode, with_host(400.0)).time.total for mode in ("none", "offload", "full")}
    assert times["none"] <= times["offload"] < times["full"]


def test_the_hosts_memory_must_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = make_plan(yuan(layout=OFFLOAD)).pricing.host_bytes / 2**30
    page = describe_plan(make_plan(yuan(layout=OFFLOAD), with_host(25.0, 1.01 * needed)))
    assert "a rank wait in the host's memory, of which a device's share is" in page and "DOES NOT FIT" not in page
    small = with_host(25.0, float(int(0.99 * needed)))
    plan = make_plan(yuan(layout=OFFLOAD), small)
    assert plan.spare_bytes > 0 and not plan.fits
    page = describe_plan(plan)
    assert "  DOES NOT FIT: " in page and "  fits: " in page and "would fit: --layout.recompute full" in page
    written = tmp_path / "small.toml"
    written.write_text(machine_toml(small), encoding="utf-8")
    with pytest.raises(UserError, match="are to wait in the host's memory") as refused:
        check(yuan(layout=OFFLOAD, machine={"gpu": str(written)}), RunFolder(tmp_path / "run"))
    assert refused.value.where == "layout.recompute" and "--layout.recompute full" in refused.value.fix
    with pytest.raises(UserError, match="share of the host's memory does not hold"):
        share_out(yuan(layout=OFFLOAD), (("a100-80g", 304), (str(written), 304)))


def test_a_machine_that_says_nothing_of_its_host_has_pcie_of_an_unknown_memory(tmp_path: Path) -> None:
    text = machine_toml(A100)
    path = tmp_path / "mine.toml"
    path.write_text(text[:text.index("[host]")], encoding="utf-8")
    host = load_machine(str(path)).host
    assert (host.gb_per_s, host.share_gib) == (31.5, 0.0)
    assert make_plan(yuan(layout=OFFLOAD), load_machine(str(path))).pricing.host_fits


def test_offloading_is_among_what_would_fit() -> None:
    needed = on_one_gpu("offload").memory[0].total / 2**30
    chip = dataclasses.replace(A100.chip, memory_gib=1.001 * needed + A100.chip.reserved_gib)
    plan = on_one_gpu("none", dataclasses.replace(A100, chip=chip))
    assert not plan.fits and "--layout.recompute offload: " in describe_plan(plan)
