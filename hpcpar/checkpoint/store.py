"""One HDF5 file of boxes: libhdf5 lays it out in memory, plain writes put it on disk.

    memfd (sparse)   | metadata |......hole......| metadata |....hole....|   made by libhdf5, a few KiB of pages
    arrays                       aaaaaaaaaaaaaaaa            bbbbbbbbbbbb
    file on disk     | metadata |aaaaaaaaaaaaaaaa| metadata |bbbbbbbbbbbb|   one pass: hash a chunk, write a chunk

So the checksum is that of the bytes meant, not of bytes read back; a full disk is a plain OSError, never a libhdf5
handle that cannot be closed; and no lock is ever taken.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import h5py
import numpy as np
import xxhash

from hpcpar.checkpoint.format import FileEntry

# stays in a core's cache between hashing and writing
CHUNK_BYTES = 1 << 20
# HDF5 1.10 is the first with virtual datasets; a newer format would shut out the h5dump and HDFView of most clusters
_LIBVER = ("v110", "v110")


class Dataset(NamedTuple):
    """A dataset to be: its path in the file, shape, dtype and box offset."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: tuple[int, ...]


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading, with locking off: flock fails or hangs on many cluster file systems."""
    with h5py.File(path, "r", locking=False) as file:
        yield file


def header_in_memory(build: Callable[[h5py.File], None]) -> int:
    """Return the descriptor of an HDF5 file in memory that `build` has filled; the caller closes it."""
    descriptor = os.memfd_create("hpcpar-hdf5")
    with (io.FileIO(descriptor, "r+", closefd=False) as sparse,
          h5py.File(sparse, "w", libver=_LIBVER, track_order=False) as file):
        build(file)
    return descriptor


def declare(file: h5py.File, datasets: list[Dataset]) -> list[int]:
    """Create datasets, contiguous and without values, in this order; return where their bytes go in the file."""
    places = []
    for dataset in datasets:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # the place is known before a value is written
        made = file.create_dataset(dataset.path, dataset.shape, dataset.dtype, dcpl=properties, fill_time="never")
        made.attrs["offset"] = np.array(dataset.offset, dtype="<u8")
        places.append(int(made.id.get_offset()))
    return places


def write_file(path: Path, datasets: list[Dataset], arrays: Mapping[str, np.ndarray[Any, Any]]) -> FileEntry:
    """Write a new file of boxes and sync it; datasets without an array are left as holes for `fill_file`.

    `arrays` holds contiguous arrays by dataset path. Raises: OSError. Cost: one pass over the arrays.
    """
    places: list[int] = []
    header = header_in_memory(lambda file: places.extend(declare(file, datasets)))
    data = {at: _bytes(arrays[d.path]) for d, at in zip(datasets, places, strict=True) if d.path in arrays}
    try:
        return _write(path, header, data)
    finally:
        os.close(header)


def write_header(path: Path, build: Callable[[h5py.File], None]) -> FileEntry:
    """Write a new HDF5 file that has only what `build` puts in (attributes, virtual datasets), and sync it."""
    header = header_in_memory(build)
    try:
        return _write(path, header, {})
    finally:
        os.close(header)


def fill_file(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Put arrays into the holes that `write_file` left for them, and sync. Raises: OSError, KeyError."""
    with open_hdf5(path) as hdf5:  # asked of the file, so that two ranks with unlike HDF5 versions agree
        places = {name: int(hdf5[name].id.get_offset()) for name in arrays}
    with path.open("r+b") as file:
        for name, array in arrays.items():
            file.seek(places[name])
            for chunk in _chunks(_bytes(array)):
                file.write(chunk)
        _sync(file)


def checksum_file(path: Path, note: Callable[[int], object] = lambda num_bytes: None) -> FileEntry:
    """Return a file's size and checksum, telling `note` of the bytes. Cost: reads it once, a MiB at a time.

    Raises: OSError.
    """
    digest, size = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            note(count)
    return FileEntry(path.name, size, digest.hexdigest())


def write_bytes(path: Path, raw: bytes) -> None:
    """Write and sync a small file."""
    with path.open("xb") as file:
        file.write(raw)
        _sync(file)


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, header: int, data: Mapping[int, memoryview]) -> FileEntry:
    """Write `header`'s bytes with `data` (by place) laid over its holes, from front to back."""
    end = os.fstat(header).st_size
    digest, at, nothing = xxhash.xxh3_128(), 0, bytes(CHUNK_BYTES)
    with path.open("xb") as file:
        for place in [*sorted(data), end]:
            while at < place:
                chunk = os.pread(header, min(CHUNK_BYTES, place - at), at)
                digest.update(chunk)
                if chunk == nothing:  # a hole that another rank fills
                    file.seek(len(chunk), os.SEEK_CUR)
                else:
                    file.write(chunk)
                at += len(chunk)
            for piece in _chunks(data.get(place, memoryview(b""))):
                digest.update(piece)
                file.write(piece)
                at += len(piece)
        file.truncate(at)  # where the last chunk was a hole
        _sync(file)
    return FileEntry(path.name, at, digest.hexdigest())


def _bytes(array: np.ndarray[Any, Any]) -> memoryview:
    """View a contiguous array's bytes, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def _chunks(raw: memoryview) -> Iterator[memoryview]:
    return (raw[at : at + CHUNK_BYTES] for at in range(0, len(raw), CHUNK_BYTES))


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
