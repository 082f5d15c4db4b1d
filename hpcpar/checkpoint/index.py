"""model.h5: every logical tensor whole, as an HDF5 virtual dataset over the shard files beside it."""

from __future__ import annotations

import io
from pathlib import Path

import h5py
import numpy as np
import xxhash

from hpcpar.checkpoint.format import BFLOAT16, INDEX, FileEntry, Manifest, StoredBox, dataset_path, index_path
from hpcpar.checkpoint.store import Maker, hdf5_image, write_bytes


def index_image(manifest: Manifest) -> bytes:
    """Return model.h5 for the shard files that `manifest` lists. Cost: about 20 microseconds a box and kind."""
    boxes: dict[str, list[tuple[str, StoredBox]]] = {name: [] for name in manifest.tensors}
    for file in manifest.files:
        for box in file.boxes:
            boxes[box.tensor].append((file.name, box))

    def build(hdf5: h5py.File) -> None:
        hdf5.attrs["step"] = manifest.step
        maker = Maker(hdf5)
        for kind in manifest.kinds:
            for tensor, sources in boxes.items():
                _virtual(maker, kind, manifest.dtype(kind, tensor), manifest.tensors[tensor], tensor, sources)

    return hdf5_image(build)


def write_index(folder: Path, image: bytes, step: int) -> FileEntry:
    """Write an `index_image` as model.h5 with another step, and sync it: no shard file is opened. Raises: OSError."""
    memory = io.BytesIO(image)
    with h5py.File(memory, "r+") as hdf5:
        hdf5.attrs.modify("step", step)
    raw = memory.getvalue()
    write_bytes(folder / INDEX, raw)
    return FileEntry(INDEX, len(raw), xxhash.xxh3_128_hexdigest(raw))


def _virtual(maker: Maker, kind: str, dtype: str, shape: tuple[int, ...], tensor: str,
             sources: list[tuple[str, StoredBox]]) -> None:
    """Map a tensor's boxes. Low-level calls: h5py's VirtualLayout costs five times as much a box."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    # HDF5 reads a missing source as the fill value, without an error: let it at least be seen
    if dtype == BFLOAT16 or np.dtype(dtype).kind == "f":
        properties.set_fill_value(np.array(np.nan, dtype="float32" if dtype == BFLOAT16 else dtype))
    # a virtual dataset has at least one dim: a tensor without any becomes [1]
    space = h5py.h5s.create_simple(shape or (1,))
    for file_name, (_, box) in sources:
        if shape:
            space.select_hyperslab(box.offset, (1,) * len(shape), block=box.size)
        path = dataset_path(kind, tensor, box)
        properties.set_virtual(space, file_name.encode(), path.encode(), maker.space(box.size))
    space.select_all()
    maker.at(index_path(kind, tensor), dtype, space, properties)
