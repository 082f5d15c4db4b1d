"""What lossless compression of a real set gains and costs, by kind: bytes kept, and MiB/s to pack and to unpack.

    python benchmarks/compression.py runs/demo/checkpoints/step-00000240 [--repeat 5]

One core, in memory: no disk is measured. The first row of a kind is what writing without compression does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from hpcpar.checkpoint import verify_set
from hpcpar.checkpoint.format import COMPRESSIONS, dataset_path
from hpcpar.checkpoint.load import load_box
from hpcpar.checkpoint.store import Dataset, open_hdf5, write_file
from hpcpar.layout.boxes import whole


def measure(datasets: list[Dataset], arrays: dict[str, np.ndarray[Any, Any]], how: str, file: Path) -> tuple[Any, ...]:
    start = time.perf_counter()
    size = write_file(file, datasets, arrays, how).size
    packed = time.perf_counter()
    with open_hdf5(file) as hdf5:
        for path, array in arrays.items():
            assert hdf5[path][...].tobytes() == array.tobytes(), path
    unpacked = time.perf_counter()
    file.unlink()
    return size, packed - start, unpacked - packed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("set", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    manifest = verify_set(args.set)
    print("| kind | compression | kept | pack MiB/s | read MiB/s |\n|---|---|---|---|---|")
    for kind in sorted(manifest.kinds):
        arrays = {dataset_path(kind, name, whole(shape)): load_box(args.set, manifest, name, whole(shape), [kind])[kind]
                  for name, shape in manifest.tensors.items()}
        datasets = [Dataset(path, array.shape, manifest.kinds[kind], (0,) * array.ndim)
                    for path, array in arrays.items()]
        total = sum(array.nbytes for array in arrays.values())
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            for how in COMPRESSIONS:
                found = [measure(datasets, arrays, how, Path(folder) / "file.h5") for _ in range(args.repeat)]
                pack, read = (statistics.median(f[n] for f in found) for n in (1, 2))
                print(f"| {kind} | {how} | {found[0][0] / total:.3f} | {total / 2**20 / pack:.0f} | "
                      f"{total / 2**20 / read:.0f} |", flush=True)


if __name__ == "__main__":
    main()
