"""A sample of `make signals`, on 8 ranks."""

import tempfile
from pathlib import Path

import pytest

from tests.chaos.signals import campaign
from tests.train.small import make_store


@pytest.mark.mpi
def test_a_signal_to_one_rank_stops_all_cleanly(world):
    with tempfile.TemporaryDirectory() as own:
        place = Path(world.control.broadcast(own))
        if world.rank == 0:
            make_store(place)
        world.control.barrier()
        seen = campaign(world, place, range(2))
        world.control.barrier()
        if world.rank == 0:
            assert sum(seen.values()) == 2 and any("step" in what for what in seen)
