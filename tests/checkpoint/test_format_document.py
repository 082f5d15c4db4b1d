"""docs/checkpoint-format.md is enough: a reader written from it alone finds every bit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

from hpcpar.checkpoint import load_tensor, read_manifest, verify_set
from hpcpar.checkpoint.format import index_path
from hpcpar.errors import CheckpointError
from tests.checkpoint.sets import GPT, KINDS, LLAMA, make_layout, reference, save

READER = Path(__file__).with_name("independent_reader.py")


def read_all(checkpoints: Path, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, READER, checkpoints, out, *words], text=True, capture_output=True,
                          cwd="/", env=environment)


@pytest.mark.parametrize(("model", "cut", "dtype", "words"), [
    (LLAMA, (4, 2, 2), "float64", ()), (GPT, (2, 1, 3), "float32", ()),
    pytest.param({**GPT, "layers": 1}, (2, 1, 2), "float32", ("h5dump",), marks=pytest.mark.skipif(
        shutil.which("h5dump") is None, reason="h5dump is not installed"))])
def test_an_independent_reader_finds_every_bit(tmp_path: Path, model: dict, cut: tuple, dtype: str,
                                               words: tuple) -> None:
    layout = make_layout(model, *cut)
    checkpoints = tmp_path / "checkpoints"
    save(checkpoints, 4, make_layout(GPT))
    save(checkpoints, 5, layout, dtype, ranks_per_file=2)
    (checkpoints / ".step-00000006.tmp").mkdir()
    (checkpoints / "step-00000007.aside").mkdir()
    done = read_all(checkpoints, tmp_path / "out", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["step-00000005", "5"]
    for parameter in layout.table:
        for kind in KINDS:
            expected = reference(kind, parameter.name, parameter.shape, dtype)
            assert (tmp_path / "out" / kind / parameter.name).read_bytes() == expected.tobytes()
    shard = checkpoints / "step-00000005" / "shard-00000.h5"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert "shard-00000.h5" in read_all(checkpoints, tmp_path / "out").stderr


def test_a_missing_source_is_an_error_for_us_and_nan_for_others(tmp_path: Path) -> None:
    path = save(tmp_path, 1, make_layout(GPT, 2, 1, 2))
    lost = next(file for file in read_manifest(path).files if file.boxes)
    name = lost.boxes[0].tensor
    (path / lost.name).unlink()
    with h5py.File(path / "model.h5", locking=False) as index:  # what HDF5 does, which no reader of ours leaves to it
        values = index[index_path("weight", name)][:]
    assert (values != values).any()
    for read in (lambda: load_tensor(path, name), lambda: verify_set(path)):
        with pytest.raises(CheckpointError, match=rf"{lost.name} is missing \(tensors hit: "):
            read()
    with pytest.raises(CheckpointError, match=lost.name):
        load_tensor(path, name, verify=False)
