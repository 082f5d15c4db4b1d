"""Parts of datasets, read with and without a checksum, against numpy's slices."""

import random
from pathlib import Path

import numpy as np
import pytest

from hpcpar.checkpoint import read
from hpcpar.checkpoint.format import WEIGHT, Manifest, StoredBox, dataset_path, read_manifest
from hpcpar.checkpoint.load import load_box
from hpcpar.checkpoint.publish import complete, published
from hpcpar.checkpoint.store import Dataset, open_hdf5, write_file
from hpcpar.errors import CheckpointError
from hpcpar.layout.boxes import Box
from tests.checkpoint.sets import reference

SHAPES = {"line": (5000,), "rows": (40, 9), "wide": (7, 3000), "deep": (3, 4, 1500), "four": (2, 3, 4, 5), "one": ()}


def halves(shape: tuple[int, ...]) -> list[Box]:
    """Cut the last dim unevenly in two."""
    if not shape:
        return [Box((), ())]
    cut = shape[-1] // 3
    zeros = (0,) * (len(shape) - 1)
    return [Box((*zeros, 0), (*shape[:-1], cut)), Box((*zeros, cut), (*shape[:-1], shape[-1] - cut))]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A set of two kinds; each tensor lies in two boxes."""
    kinds, boxes, arrays = {"exp_avg": "float32", WEIGHT: "float64"}, [], {}
    for name, shape in SHAPES.items():
        boxes += [StoredBox(name, box) for box in halves(shape)]
    datasets = [Dataset(dataset_path(kind, *stored), stored.box.size, dtype, stored.box.offset)
                for kind, dtype in kinds.items() for stored in boxes]
    for kind, dtype in kinds.items():
        for name, box in boxes:
            whole = np.asarray(reference(kind, name, SHAPES[name], dtype))
            arrays[dataset_path(kind, name, box)] = np.ascontiguousarray(whole[box.slices()]).reshape(box.size)
    with published(tmp_path / "set") as folder:
        entry = write_file(folder / "shard-00000.h5", datasets, arrays)
        entry = type(entry)(entry.name, entry.size, entry.checksum, (0,), tuple(boxes), entry.start)
        complete(folder, Manifest(0, kinds, SHAPES, (entry,), {}))
    return tmp_path / "set"


def random_box(shape: tuple[int, ...], dice: random.Random) -> Box:
    offset = tuple(dice.randrange(size) for size in shape)
    return Box(offset, tuple(dice.randint(1, size - at) for size, at in zip(shape, offset, strict=True)))


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 4096 + 8])
@pytest.mark.parametrize("verify", [True, False])
def test_any_part_of_any_tensor(path: Path, verify: bool, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "CHUNK_BYTES", chunk_bytes)
    manifest, dice = read_manifest(path), random.Random(5)
    for name, shape in SHAPES.items():
        for kind, dtype in manifest.kinds.items():
            want = np.asarray(reference(kind, name, shape, dtype))
            for _ in range(25):
                box = random_box(shape, dice)
                found = load_box(path, manifest, name, box, [kind], verify)[kind]
                np.testing.assert_array_equal(found, want[box.slices()])


def test_the_manifest_says_where_values_lie(path: Path) -> None:
    """What docs/checkpoint-format.md promises to readers without HDF5."""
    manifest = read_manifest(path)
    raw = (path / "shard-00000.h5").read_bytes()
    with open_hdf5(path / "shard-00000.h5") as hdf5:
        for at, num_bytes, kind, stored in manifest.places(manifest.files[0]):
            dataset = hdf5[dataset_path(kind, *stored)]
            assert dataset.id.get_offset() == at and dataset[...].tobytes() == raw[at : at + num_bytes]


def test_a_start_that_does_not_fit_the_file_is_refused(path: Path) -> None:
    manifest = read_manifest(path)
    (entry, index) = manifest.files
    wrong = type(entry)(entry.name, entry.size, entry.checksum, entry.ranks, entry.boxes, entry.size - 100)
    torn = Manifest(0, manifest.kinds, manifest.tensors, (wrong, index), {})
    (path / "manifest.json").write_bytes(torn.to_bytes())
    with pytest.raises(CheckpointError, match=r"shard-00000.h5: its values end at byte"):
        read_manifest(path)


def test_a_set_of_before_start_was_kept_is_read_through_hdf5(path: Path) -> None:
    manifest = read_manifest(path)
    (entry, index) = manifest.files
    old = type(entry)(entry.name, entry.size, entry.checksum, entry.ranks, entry.boxes)
    manifest = Manifest(0, manifest.kinds, manifest.tensors, (old, index), {})
    for name, shape in SHAPES.items():
        box = random_box(shape, random.Random(1))
        want = np.asarray(reference(WEIGHT, name, shape, "float64"))[box.slices()]
        np.testing.assert_array_equal(load_box(path, manifest, name, box, [WEIGHT], verify=True)[WEIGHT], want)
