"""model.h5: every logical tensor whole, as an HDF5 virtual dataset over the shard files beside it."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from hpcpar.checkpoint.format import INDEX, FileEntry, Manifest, StoredBox, dataset_path, index_path
from hpcpar.checkpoint.store import write_header


def write_index(folder: Path, manifest: Manifest) -> FileEntry:
    """Write model.h5 for the shard files that `manifest` lists, and sync it. Raises: OSError.

    Cost: one rank, about 20 microseconds a box and kind; no shard file is opened.
    """
    boxes: dict[str, list[tuple[str, StoredBox]]] = {name: [] for name in manifest.tensors}
    for file in manifest.files:
        for box in file.boxes:
            boxes[box.tensor].append((file.name, box))

    def build(hdf5: h5py.File) -> None:
        hdf5.attrs["step"] = manifest.step
        for kind, dtype in manifest.kinds.items():
            for tensor, sources in boxes.items():
                _virtual(hdf5, kind, dtype, manifest.tensors[tensor], tensor, sources)

    return write_header(folder / INDEX, build)


def _virtual(hdf5: h5py.File, kind: str, dtype: str, shape: tuple[int, ...], tensor: str,
             sources: list[tuple[str, StoredBox]]) -> None:
    """Map a tensor's boxes. Low-level calls: h5py's VirtualLayout costs five times as much a box."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    # HDF5 reads a missing source as the fill value, without an error: let it at least be seen
    properties.set_fill_value(np.array(np.nan, dtype=dtype))
    space = h5py.h5s.create_simple(shape)
    for file_name, (_, box) in sources:
        space.select_hyperslab(box.offset, (1,) * len(shape), block=box.size)
        source = h5py.h5s.create_simple(box.size)
        path = dataset_path(kind, tensor, box)
        properties.set_virtual(space, file_name.encode(), path.encode(), source)
    space.select_all()
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    stored = h5py.h5t.py_create(np.dtype(dtype), logical=True)
    h5py.h5d.create(hdf5.id, index_path(kind, tensor).encode(), stored, space, properties, links)
