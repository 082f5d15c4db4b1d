"""Saves that keep what does not change between them write what a first save would (but for HDF5's time stamps)."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

import hpcpar.checkpoint.tasks as tasks_module
from hpcpar.checkpoint import load_shards, load_tensor, save_set, verify_set
from hpcpar.checkpoint.format import index_path, read_manifest
from hpcpar.checkpoint.save import save_now
from hpcpar.checkpoint.tasks import Saving, Tasks
from hpcpar.comm.control import Control
from hpcpar.errors import CheckpointError
from tests.checkpoint.sets import GPT, assert_equal, make_layout, on_ranks, shards_of

LAYOUT = make_layout(GPT, 2, 1, 2)


def shards_at(rank: int, step: int) -> dict[str, list[np.ndarray]]:
    """From step 3 on the moments are of another dtype."""
    return {kind: [(flat * step).astype("float64" if step > 2 and kind != "weight" else "float32") for flat in flats]
            for kind, flats in shards_of(LAYOUT, rank).items()}


@pytest.mark.parametrize(("ranks_per_file", "compression"), [(1, "none"), (3, "none"), (1, "blosc2-lz4")])
def test_later_saves_equal_first_ones(tmp_path: Path, ranks_per_file: int, compression: str) -> None:
    def again(control: Control) -> list[Path]:
        tasks = Tasks(Saving(tmp_path / "again", LAYOUT, ranks_per_file, compression=compression), control.rank, {})
        found = []
        for step in range(1, 5):
            tasks.shards = shards_at(control.rank, step)
            found.append(save_now(tasks, step, control, {"step": step}).path)
        return found

    def afresh(control: Control) -> list[Path]:
        return [save_set(tmp_path / "afresh", step, LAYOUT, control.rank, control, shards_at(control.rank, step),
                         {"step": step}, ranks_per_file, compression=compression) for step in range(1, 5)]

    for one, other in zip(on_ranks(4, again)[0], on_ranks(4, afresh)[0], strict=True):
        again_says, afresh_says = read_manifest(one), verify_set(other)
        assert verify_set(one) == again_says
        assert [replace(file, checksum="") for file in again_says.files] == \
               [replace(file, checksum="") for file in afresh_says.files]
        assert replace(again_says, files=()) == replace(afresh_says, files=())
        step = again_says.step
        with h5py.File(one / "model.h5") as index:
            assert index.attrs["step"] == step
            for name in again_says.tensors:
                np.testing.assert_array_equal(index[index_path("exp_avg", name)][:].reshape(again_says.tensors[name]),
                                              load_tensor(one, name, "exp_avg"))
        assert_equal(load_shards(one, LAYOUT, 1, "float64"),
                     {kind: [flat.astype("float64") for flat in flats] for kind, flats in shards_at(1, step).items()})


def test_libhdf5_is_asked_once_a_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, asked = make_layout(GPT), []
    for name in ("lay_out", "index_image"):
        real = getattr(tasks_module, name)
        monkeypatch.setattr(tasks_module, name, lambda what, name=name, real=real: asked.append(name) or real(what))
    tasks = Tasks(Saving(tmp_path, layout), 0, shards_of(layout, 0))
    on_ranks(1, lambda control: [save_now(tasks, step, control, {}) for step in (1, 2, 3)])
    assert sorted(asked) == ["index_image", "lay_out"]
    tasks.shards = {kind: [flat.astype("float64") for flat in flats] for kind, flats in tasks.shards.items()}
    on_ranks(1, lambda control: save_now(tasks, 4, control, {}))
    assert sorted(asked) == ["index_image"] * 2 + ["lay_out"] * 2


def test_shards_of_another_shape_are_refused_at_a_later_save(tmp_path: Path) -> None:
    layout = make_layout(GPT)
    tasks = Tasks(Saving(tmp_path, layout), 0, shards_of(layout, 0))
    on_ranks(1, lambda control: save_now(tasks, 1, control, {}))
    tasks.shards = {kind: [flat[:-1] for flat in flats] for kind, flats in tasks.shards.items()}
    [error] = on_ranks(1, lambda control: save_now(tasks, 2, control, {}))
    assert isinstance(error, CheckpointError) and "the layout's buckets want" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
