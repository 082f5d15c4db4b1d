"""torch.distributed.checkpoint over sets: torch's own writer and reader are the oracle."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hpcpar.checkpoint import load_tensor, verify_set
from hpcpar.checkpoint.dcp import HDF5Reader, HDF5Writer
from tests.checkpoint.sets import GPT, make_layout, reference, save

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8,
          torch.bool)


def one_process_state() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    tensors = {str(dtype).removeprefix("torch."): (torch.randn(5, 7, generator=draw) * 100).to(dtype)
               for dtype in DTYPES}
    return {"tensors": tensors, "step": torch.tensor(17), "empty": torch.zeros(0, 3),
            "turned": torch.randn(4, 6, generator=draw).T, "epoch": 3,
            "optim": {"betas": (0.9, 0.95), "groups": [{"lr": 1e-3, "names": ["a", "b"]}], "note": None}}


def zeros_like(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state)
    if isinstance(state, dict):
        return {key: zeros_like(value) for key, value in state.items()}
    return [zeros_like(v) for v in state] if isinstance(state, list) else 0


def assert_same(found: Any, want: Any) -> None:
    assert type(found) is type(want)
    if isinstance(want, torch.Tensor):
        assert found.dtype == want.dtype and torch.equal(found, want)
    elif isinstance(want, dict):
        assert found.keys() == want.keys()
        for key in want:
            assert_same(found[key], want[key])
    else:
        assert found == want


def test_save_and_load_in_one_process(tmp_path: Path) -> None:
    path, state = tmp_path / "step-00000012", one_process_state()
    dcp.save(state, storage_writer=HDF5Writer(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000012"]
    found = zeros_like(state)
    dcp.load(found, storage_reader=HDF5Reader(path))
    assert_same(found, state)
    manifest = verify_set(path)
    assert manifest.step == 12 and manifest.files[0].start
    assert b"pickle" not in b"".join(file.read_bytes() for file in path.iterdir())
    with h5py.File(path / "model.h5") as index:
        for name, tensor in state["tensors"].items():
            stored = index[f"tensors/{name}"]
            assert (torch.from_numpy(stored[:]).double() == tensor.double()).all(), name
        assert index["tensors/bfloat16"].attrs["dtype"] == "bfloat16" and index["step"][0] == 17
        assert index["tensors/bfloat16"].id.get_type().get_size() == 2
    assert (load_tensor(path, "tensors.bfloat16") == state["tensors"]["bfloat16"].float().numpy()).all()


def test_every_bit_pattern_of_bfloat16_is_kept_and_readable(tmp_path: Path) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    dcp.save({"w": bits.view(torch.bfloat16)}, storage_writer=HDF5Writer(tmp_path / "set"))
    found = {"w": torch.zeros(1 << 16, dtype=torch.bfloat16)}
    dcp.load(found, storage_reader=HDF5Reader(tmp_path / "set"))
    assert torch.equal(found["w"].view(torch.int16), bits)
    with h5py.File(tmp_path / "set" / "model.h5") as index:
        np.testing.assert_array_equal(index["w"][:], bits.view(torch.bfloat16).float().numpy())
    found = {"w": torch.zeros(1 << 16)}  # and widens where the state does
    dcp.load(found, storage_reader=HDF5Reader(tmp_path / "set"))
    np.testing.assert_array_equal(found["w"].numpy(), bits.view(torch.bfloat16).float().numpy())


@pytest.mark.parametrize(("state", "words"), [
    ({"w": torch.zeros(2), "o": {"f": SimpleNamespace()}}, "o.f: is or holds a SimpleNamespace"),
    ({"w": torch.zeros(2), "o": [{1, 2}]}, "o: is or holds a set"),
    ({"w": torch.zeros(2), "o": float("nan")}, "o: is or holds nan"),
    ({"w": torch.zeros(2, dtype=torch.complex64)}, "w: consists of complex64"),
    ({"a-b": torch.zeros(2)}, "a-b: is no name"),
    ({"a": torch.zeros(2), "a.b": torch.zeros(2)}, "a.b: lies beneath the tensor a"),
])
def test_what_a_set_cannot_hold_is_refused(state: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match=words):
        dcp.save(state, storage_writer=HDF5Writer(tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_a_failed_save_leaves_the_one_before(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2)}, storage_writer=HDF5Writer(tmp_path / "set"))
    with pytest.raises(CheckpointException):
        dcp.save({"w": torch.zeros(2), "o": object()}, storage_writer=HDF5Writer(tmp_path / "set"))
    found = {"w": torch.zeros(2)}
    dcp.load(found, storage_reader=HDF5Reader(tmp_path / "set"))
    assert found["w"].tolist() == [1, 1]
    dcp.save({"w": torch.full((2,), 5.0)}, storage_writer=HDF5Writer(tmp_path / "set"))
    dcp.load(found, storage_reader=HDF5Reader(tmp_path / "set"))
    assert found["w"].tolist() == [5, 5]
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"] or (tmp_path / ".set.tmp").exists()


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(1000)}, storage_writer=HDF5Writer(tmp_path / "set"))
    file = tmp_path / "set" / "shard-00000.h5"
    raw = bytearray(file.read_bytes())
    raw[verify_set(tmp_path / "set").files[0].start + 77] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointException, match=r"shard-00000.h5.*tensors hit: w"):
        dcp.load({"w": torch.ones(1000)}, storage_reader=HDF5Reader(tmp_path / "set"))


def test_torch_loads_what_a_training_run_saved(tmp_path: Path) -> None:
    layout = make_layout(GPT, 2, 2, 2)
    path = save(tmp_path, 4, layout)
    state = {p.name: torch.zeros(p.shape) for p in layout.table}
    moments = {f"optimizer.exp_avg.{name}": torch.zeros_like(t) for name, t in state.items()}
    dcp.load({**state, **moments}, storage_reader=HDF5Reader(path))
    for p in layout.table:
        assert (state[p.name].numpy() == reference("weight", p.name, p.shape)).all()
        assert (moments[f"optimizer.exp_avg.{p.name}"].numpy() == reference("exp_avg", p.name, p.shape)).all()


@pytest.fixture(params=["mpi4py", "gloo"])
def ranks(request: pytest.FixtureRequest, world: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = world.comm.bcast(str(tmp_path_factory.mktemp("dcp")) if world.rank == 0 else None)
    group = None if request.param == "mpi4py" else dist.new_group(backend="gloo")
    yield SimpleNamespace(rank=world.rank, comm=world.comm, folder=Path(folder), group=group)
    if group is not None:
        dist.destroy_process_group(group)


def sharded(mesh: DeviceMesh, seed: int) -> dict[str, Any]:
    """A network's worth of shards: both dims cut, one, none, uneven (11 rows on 4, 3 rows on 8), in three dtypes."""
    draw = torch.Generator().manual_seed(seed)
    cuts = {"both": ((16, 12), (Shard(0), Shard(1))), "rows": ((11, 5), (Shard(0), Replicate())),
            "columns": ((6, 24), (Replicate(), Shard(1))), "few": ((3, 4), (Shard(0), Shard(0))),
            "copied": ((7,), (Replicate(), Replicate()))}
    state: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for name, (shape, placements) in cuts.items():
            whole = (torch.randn(shape, generator=draw) * 1000).to(dtype)
            state[f"{name}_{str(dtype).removeprefix('torch.')}"] = distribute_tensor(whole, mesh, placements)
    plain = torch.randn(4, 4, generator=draw)
    return {"model": state, "plain": plain, "lr": 0.1 * (seed + 1)}


@pytest.mark.mpi
def test_save_at_one_mesh_load_at_another_as_torch_does(ranks: SimpleNamespace) -> None:
    sizes = ((4, 2), (2, 4))
    before, after = (DeviceMesh("cpu", torch.arange(8).reshape(size)) for size in sizes)
    state = sharded(before, 1)
    theirs, ours = ranks.folder / "theirs", ranks.folder / "step-00000003"
    dcp.save(state, storage_writer=dcp.FileSystemWriter(theirs), process_group=ranks.group)
    dcp.save(state, storage_writer=HDF5Writer(ours), process_group=ranks.group)
    for mesh in (before, after):
        want, found = sharded(mesh, 2), sharded(mesh, 2)
        dcp.load(want, storage_reader=dcp.FileSystemReader(theirs), process_group=ranks.group)
        dcp.load(found, storage_reader=HDF5Reader(ours), process_group=ranks.group)
        assert found["lr"] == want["lr"] == 0.2 and torch.equal(found["plain"], want["plain"])
        for name, tensor in want["model"].items():
            assert isinstance(tensor, DTensor)
            assert torch.equal(found["model"][name].to_local(), tensor.to_local()), name
    if ranks.rank == 0:
        manifest = verify_set(ours)
        assert 2 < len(manifest.files) <= 9
        with h5py.File(ours / "model.h5") as index:
            for name, tensor in whole_of(sharded, before).items():
                assert (torch.from_numpy(index[f"model/{name}"][:]).double() == tensor.double()).all(), name
    else:
        whole_of(sharded, before)
    ranks.comm.Barrier()


def whole_of(make: Any, mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """Gather the tensors; every rank must call."""
    return {name: tensor.full_tensor() for name, tensor in make(mesh, 1)["model"].items()}


@pytest.mark.mpi
def test_a_value_that_json_cannot_hold_fails_on_all_ranks(ranks: SimpleNamespace) -> None:
    with pytest.raises(CheckpointException, match="o: is or holds a object"):
        dcp.save({"w": torch.ones(3), "o": object()}, storage_writer=HDF5Writer(ranks.folder / "set"),
                 process_group=ranks.group)
    ranks.comm.Barrier()
    assert not (ranks.folder / "set").exists()
    ranks.comm.Barrier()
