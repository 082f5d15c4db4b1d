"""Eight ranks measure their exchanges at once."""

from __future__ import annotations

import pytest

from hpcpar.planner.calibration import fit
from hpcpar.train import calibrate

pytestmark = pytest.mark.mpi


def test_exchanges_in_groups_of_each_size(world, monkeypatch):
    monkeypatch.setattr(calibrate, "WINDOW_S", 0.002)
    monkeypatch.setattr(calibrate, "DTYPES", {"fp32": calibrate.DTYPES["fp32"]})
    said = []
    found = calibrate.measure(world, said.append)
    assert found.ranks_per_node == 8
    assert [e.size for e in found.inside] == [size for size in (2, 4, 8) for _ in calibrate.EXCHANGES]
    assert not found.across
    assert all(e.seconds > 0 for e in found.inside)
    assert len(said) == 5
    everyones = world.control.all_gather([p.seconds for p in found.products])
    assert everyones.count(everyones[0]) == 8  # all ranks know the same
    if world.rank == 0:
        machine = fit(found, ["a test"])
        assert machine.inside.devices == 8
        assert machine.inside.latency_us > 0 or machine.inside.bytes_per_s > 0
