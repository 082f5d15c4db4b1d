"""A reader written from docs/checkpoint-format.md alone: knows no hpcpar.

    python independent_reader.py CHECKPOINTS OUT [h5dump]

Finds the newest set, checks manifest and files, and writes every tensor of every kind whole to OUT/KIND/NAME as raw
bytes, through h5py's low-level calls, or through the h5dump program.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import xxhash
from h5py import h5d, h5f, h5s


def newest(checkpoints: Path) -> Path:
    """Names of 8 digits or more; .step-N.old counts where step-N is absent."""
    sets = {}
    for path in checkpoints.iterdir():
        found = re.fullmatch(r"step-(\d{8,})|\.step-(\d{8,})\.old", path.name)
        if found and not (found[2] and (checkpoints / f"step-{found[2]}").exists()):
            sets[int(found[1] or found[2])] = path
    return sets[max(sets)]


def manifest(path: Path) -> dict:
    raw = (path / "manifest.json").read_bytes()
    assert raw[:13] == b'{"checksum": ' and raw[13:14] == raw[46:47] == b'"'
    assert xxhash.xxh3_128(raw[46:]).hexdigest().encode() == raw[14:46], "the manifest is damaged"
    content = json.loads(raw)
    assert (content["format"], content["version"]) == ("hpcpar-checkpoint", 1)
    return content


def check_file(path: Path, entry: dict) -> None:
    raw = (path / entry["name"]).read_bytes()
    assert len(raw) == entry["size"] and xxhash.xxh3_128(raw).hexdigest() == entry["checksum"], entry["name"]


def through_h5py(file: Path, dataset: str, size: list, dtype: str) -> np.ndarray:
    found = h5d.open(h5f.open(str(file).encode(), h5f.ACC_RDONLY), dataset.encode())
    assert found.shape == tuple(size) and found.get_type().get_size() == np.dtype(dtype).itemsize
    values = np.empty(size, dtype)
    found.read(h5s.ALL, h5s.ALL, values)
    return values


def through_h5dump(file: Path, dataset: str, size: list, dtype: str) -> np.ndarray:
    out = file.with_name("dumped")
    subprocess.run(["h5dump", "-d", dataset, "-b", "LE", "-o", out, file], check=True, stdout=subprocess.DEVNULL)
    return np.fromfile(out, np.dtype(dtype).newbyteorder("<")).reshape(size)


def main() -> None:
    path, out = newest(Path(sys.argv[1])), Path(sys.argv[2])
    read = through_h5dump if "h5dump" in sys.argv else through_h5py
    content = manifest(path)
    tensors, kinds = content["tensors"], content["kinds"]
    whole = {(kind, name): np.empty(shape, dtype) for kind, dtype in kinds.items() for name, shape in tensors}
    left = {key: math.prod(array.shape) for key, array in whole.items()}
    for entry in content["files"]:
        check_file(path, entry)
        for number, offset, size in entry["boxes"]:
            name = tensors[number][0]
            for kind, dtype in kinds.items():
                dataset = f"/{kind}/{name.replace('.', '/')}/{'_'.join(map(str, offset))}"
                place = tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))
                whole[kind, name][place] = read(path / entry["name"], dataset, size, dtype)
                left[kind, name] -= math.prod(size)
    assert set(left.values()) == {0}, "the boxes do not cover the tensors"
    for (kind, name), array in whole.items():
        (out / kind).mkdir(parents=True, exist_ok=True)
        (out / kind / name).write_bytes(array.tobytes())
    assert not [module for module in sys.modules if module.startswith("hpcpar")]
    print(path.name, content["step"])


if __name__ == "__main__":
    main()
