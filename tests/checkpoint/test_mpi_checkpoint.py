from pathlib import Path
from types import SimpleNamespace

import pytest

from hpcpar.checkpoint import latest_set, load_shards, save_set, verify_together
from hpcpar.comm.control import OverMPI
from hpcpar.errors import CheckpointError
from tests.checkpoint.sets import GPT, LLAMA, assert_equal, make_layout, shards_of

pytestmark = pytest.mark.mpi


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    from mpi4py import MPI
    folder = MPI.COMM_WORLD.bcast(str(tmp_path_factory.mktemp("sets")) if MPI.COMM_WORLD.rank == 0 else None)
    return SimpleNamespace(control=OverMPI(MPI.COMM_WORLD), folder=Path(folder))


@pytest.mark.parametrize("ranks_per_file", [1, 3, 8])
@pytest.mark.parametrize(("model", "before", "after"), [(GPT, (2, 2, 2), (1, 1, 8)), (LLAMA, (4, 1, 2), (2, 4, 1))])
def test_save_on_one_layout_load_on_another(place: SimpleNamespace, ranks_per_file: int, model: dict, before: tuple,
                                            after: tuple) -> None:
    control, rank = place.control, place.control.rank
    source, target = make_layout(model, *before), make_layout(model, *after)
    path = save_set(place.folder, 3, source, rank, control, shards_of(source, rank), {"step": 3}, ranks_per_file)
    assert path == latest_set(place.folder)
    assert verify_together(path, control).state == {"step": 3}
    for layout in (source, target):
        assert_equal(load_shards(path, layout, rank, "float32", verify=False), shards_of(layout, rank))
    control.barrier()


def test_one_rank_fails(place: SimpleNamespace) -> None:
    control, rank = place.control, place.control.rank
    layout = make_layout(GPT, 2, 2, 2)
    shards = shards_of(layout, rank)
    if rank == 5:
        shards["exp_avg"].pop()
    with pytest.raises(CheckpointError, match="rank 5: ValueError: shards of exp_avg"):
        save_set(place.folder, 3, layout, rank, control, shards, {})
    control.barrier()
    assert list(place.folder.iterdir()) == []
    control.barrier()
