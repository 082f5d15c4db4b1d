"""Compressed sets: the same values, by every way of reading, in fewer bytes."""

import builtins
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  # so that h5py reads what it has packed
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from hpcpar.checkpoint import load_shards, load_tensor, store, verify_set
from hpcpar.checkpoint.dcp import HDF5Reader, HDF5Writer
from hpcpar.checkpoint.format import index_path
from hpcpar.config.load import job_from_tables
from hpcpar.config.resolve import resolve
from hpcpar.errors import UserError
from tests.checkpoint.sets import GPT, KINDS, assert_equal, make_layout, reference, save, shards_of


@pytest.mark.parametrize("how", ["blosc2-zstd", "blosc2-lz4"])
def test_a_compressed_set_loads_into_any_layout(how: str, tmp_path: Path) -> None:
    layout, other = make_layout(GPT, 2, 2, 2), make_layout(GPT, 4, 1, 1)
    path = save(tmp_path, 3, layout, compression=how)
    manifest = verify_set(path)
    assert manifest.compression == how and all(file.start is None for file in manifest.files)
    for target in (layout, other):
        for rank in range(target.mesh.size):
            assert_equal(load_shards(path, target, rank, "float32"), shards_of(target, rank))
    with h5py.File(path / "model.h5") as index:
        for kind in KINDS:
            for name, shape in manifest.tensors.items():
                assert (index[index_path(kind, name)][:] == reference(kind, name, shape)).all()


def test_it_takes_fewer_bytes_and_keeps_every_bit(tmp_path: Path) -> None:
    weights = torch.randn(1500, 1000, generator=torch.Generator().manual_seed(0)) * 0.02
    state = {"fp32": weights, "bf16": weights.to(torch.bfloat16), "zeros": torch.zeros(1500, 1000),
             "scalar": torch.tensor(3)}
    dcp.save(state, storage_writer=HDF5Writer(tmp_path / "set", compression="blosc2-zstd"))
    found = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    dcp.load(found, storage_reader=HDF5Reader(tmp_path / "set"))
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name
    num_bytes = sum(tensor.nbytes for tensor in state.values())
    assert (tmp_path / "set/shard-00000.h5").stat().st_size < 0.6 * num_bytes
    with h5py.File(tmp_path / "set/model.h5") as index:
        np.testing.assert_array_equal(index["bf16"][3], state["bf16"][3].float().numpy())


def test_without_hdf5plugin_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 3, make_layout(GPT), compression="blosc2-zstd")
    true_import = builtins.__import__

    def barred(name: str, *words: Any, **more: Any) -> Any:
        if name == "hdf5plugin":
            raise ImportError(name)
        return true_import(name, *words, **more)

    monkeypatch.setattr(builtins, "__import__", barred)
    with pytest.raises(UserError, match=r"needs the package hdf5plugin.*pip install 'hpcpar\[compression\]'"):
        load_tensor(path, "final_norm.weight")
    with pytest.raises(UserError, match="hdf5plugin"):
        store.hdf5_plugin()


def test_ranks_that_share_a_file_cannot_compress() -> None:
    with pytest.raises(UserError, match=r"checkpoint.compression.*2 ranks a file"):
        resolve(job_from_tables({"checkpoint": {"compression": "blosc2-zstd", "ranks_per_file": 2},
                                 "layout": {"dp": 2}, "train": {"global_batch": 2}}), 2)
