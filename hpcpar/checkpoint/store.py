"""One HDF5 file of boxes: libhdf5 lays it out in memory, plain writes put it on disk.

    memfd (sparse)   | metadata |......hole...... ....hole....| metadata |   made by libhdf5, a few KiB of pages
    arrays                       aaaaaaaaaaaaaaaa bbbbbbbbbbbb
    file on disk     | metadata |aaaaaaaaaaaaaaaa|bbbbbbbbbbbb| metadata |   one pass: hash a chunk, write a chunk

So the checksum is that of the bytes meant, not of bytes read back; a full disk is a plain OSError, never a libhdf5
handle that cannot be closed; and no lock is ever taken. All values lie together, so that one number in the manifest
finds each of them without HDF5.
"""

from __future__ import annotations

import io
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import h5py
import numpy as np
import xxhash

from hpcpar.checkpoint.format import BFLOAT16, FileEntry, bits_of
from hpcpar.errors import UserError

# stays in a core's cache between hashing and writing
CHUNK_BYTES = 1 << 20
# handed to the disk while the rest is still being written, so that the sync at the end finds little left
PUSH_BYTES = 8 << 20
# of a compressed dataset: what is read and unpacked for one element
PACKED_BYTES = 4 << 20
# HDF5 1.10 is the first with virtual datasets; a newer format would shut out the h5dump and HDFView of most clusters
_LIBVER = ("v110", "v110")


class Dataset(NamedTuple):
    """A dataset to be: its path in the file, shape, dtype and box offset."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    offset: tuple[int, ...]


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading, with locking off: flock fails or hangs on many cluster file systems."""
    with h5py.File(path, "r", locking=False) as file:
        yield file


class _Memory(io.FileIO):
    """A file that remembers why a write failed: h5py now and then tells an AttributeError of its own instead."""

    failed: OSError | None = None

    def write(self, raw: Any) -> int:
        try:
            return super().write(raw)
        except OSError as error:
            self.failed = error
            raise


def header_in_memory(build: Callable[[h5py.File], None]) -> int:
    """Return the descriptor of an HDF5 file in memory that `build` has filled; the caller closes it."""
    descriptor = os.memfd_create("hpcpar-hdf5")
    memory = _Memory(descriptor, "r+", closefd=False)
    try:
        with memory, h5py.File(memory, "w", libver=_LIBVER, track_order=False) as file:
            build(file)
    except BaseException as error:
        os.close(descriptor)
        if memory.failed is not None:
            raise memory.failed from error
        raise
    return descriptor


def hdf5_type(dtype: str) -> h5py.h5t.TypeID:
    """Return the HDF5 datatype of a stored dtype; bfloat16 is a float of its own, which HDF5 tools convert exactly."""
    if dtype != BFLOAT16:
        return h5py.h5t.py_create(np.dtype(dtype), logical=True)
    made = h5py.h5t.IEEE_F32LE.copy()
    made.set_fields(15, 7, 8, 0, 7)  # sign, exponent (place, bits), mantissa (place, bits)
    made.set_size(2)
    made.set_ebias(127)
    return made


def declare(file: h5py.File, datasets: Sequence[Dataset]) -> list[int]:
    """Create datasets, contiguous and without values; return where their bytes go: one after another, in this order."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    maker = Maker(file)
    made = [maker.dataset(dataset, properties) for dataset in datasets]
    one, nothing = h5py.h5s.create_simple((1,)), np.zeros(1)  # of 8 bytes, as long as any element
    for dataset, its in zip(datasets, made, strict=True):
        # the first write takes the place; all metadata has its own by now, so that nothing lies between
        its.write(one, maker.first_element(dataset.shape), nothing, maker.type(dataset.dtype))
    return [int(its.get_offset()) for its in made]


class Maker:
    """Makes datasets in one file; keeps what they have in common: a handle costs a tenth of a dataset.

    Low-level calls: h5py's own cost three times as much.
    """

    def __init__(self, file: h5py.File):
        self._file = file
        self._links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        self._links.set_create_intermediate_group(True)
        self.type = cache(hdf5_type)
        self.space = cache(_space)
        self.first_element = cache(_first_element)

    def dataset(self, dataset: Dataset, properties: h5py.h5p.PropDCID) -> h5py.h5d.DatasetID:
        """Make a dataset and its attributes."""
        made = self.at(dataset.path, dataset.dtype, self.space(dataset.shape), properties)
        if dataset.offset:
            numbers = self.space((len(dataset.offset),))
            h5py.h5a.create(made, b"offset", h5py.h5t.STD_U64LE, numbers).write(np.array(dataset.offset, dtype="<u8"))
        return made

    def at(self, path: str, dtype: str, space: h5py.h5s.SpaceID, properties: h5py.h5p.PropDCID) -> h5py.h5d.DatasetID:
        """Make a dataset of a stored dtype, and the groups above it."""
        made = h5py.h5d.create(self._file.id, path.encode(), self.type(dtype), space, properties, self._links)
        if dtype == BFLOAT16:
            h5py.Dataset(made).attrs["dtype"] = BFLOAT16
        return made


def _space(shape: tuple[int, ...]) -> h5py.h5s.SpaceID:
    return h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)


def _first_element(shape: tuple[int, ...]) -> h5py.h5s.SpaceID:
    space = _space(shape)
    if shape:
        space.select_hyperslab((0,) * len(shape), (1,) * len(shape))
    return space


def pack(file: h5py.File, datasets: Sequence[Dataset], arrays: Mapping[str, np.ndarray[Any, Any]], how: str) -> None:
    """Create datasets with their values, compressed without loss: blosc2-zstd or blosc2-lz4 on shuffled bytes."""
    codec = hdf5_plugin().Blosc2(cname=how.removeprefix("blosc2-"), clevel=1, filters=1)
    maker = Maker(file)
    for dataset in datasets:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        values = arrays[dataset.path].reshape(dataset.shape)
        if dataset.shape:
            properties.set_chunk(_chunk_shape(dataset.shape, values.itemsize))
            properties.set_filter(codec.filter_id, h5py.h5z.FLAG_MANDATORY, codec.filter_options)
        one = maker.dataset(dataset, properties)
        one.write(h5py.h5s.ALL, h5py.h5s.ALL, values, one.get_type())


def hdf5_plugin() -> Any:
    """Return the hdf5plugin package, which teaches libhdf5 Blosc2. Raises: UserError if it is not installed."""
    try:
        import hdf5plugin
    except ImportError as error:
        raise UserError("checkpoint.compression", "needs the package hdf5plugin, to write and to read",
                        "pip install 'hpcpar[compression]', or write compression = \"none\"") from error
    return hdf5plugin


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Cut the first dims until a chunk fits PACKED_BYTES."""
    chunk = list(shape)
    for dim in range(len(shape)):
        inner = itemsize * math.prod(chunk[dim + 1:])
        chunk[dim] = min(chunk[dim], max(1, PACKED_BYTES // inner))
    return tuple(chunk)


class Blank(NamedTuple):
    """A file without its values: libhdf5's bytes by their place, and where each dataset's values go."""

    metadata: Mapping[int, bytes]
    places: Sequence[int]
    size: int


def lay_out(datasets: Sequence[Dataset]) -> Blank:
    """Have libhdf5 make a file of datasets. Cost: its arithmetic, about 0.15 ms a dataset. Raises: OSError."""
    places: list[int] = []
    header = header_in_memory(lambda file: places.extend(declare(file, datasets)))
    try:
        size, at, metadata = os.fstat(header).st_size, 0, {}
        ends = {place: place + _num_bytes(dataset) for dataset, place in zip(datasets, places, strict=True)}
        for place in sorted(ends):
            metadata[at] = os.pread(header, place - at, at)
            at = ends[place]
        metadata[at] = os.pread(header, size - at, at)
        return Blank({at: raw for at, raw in metadata.items() if raw}, places, size)
    finally:
        os.close(header)


def write_file(path: Path, datasets: Sequence[Dataset], arrays: Mapping[str, np.ndarray[Any, Any]],
               compression: str = "none", blank_of: Callable[[tuple[Dataset, ...]], Blank] = lay_out) -> FileEntry:
    """Write a new file of boxes and sync it; datasets without an array are left as holes for `fill_file`.

    `arrays` holds contiguous arrays by dataset path (bfloat16: its bits as uint16). `blank_of` may be a `lay_out` that
    keeps what it has made. Raises: OSError, UserError. Cost: one pass over the arrays; compressed, also the packed
    bytes in memory.
    """
    if compression != "none":
        header = header_in_memory(lambda file: pack(file, datasets, arrays, compression))
        try:
            raw = memoryview(mmap.mmap(header, 0, prot=mmap.PROT_READ))
            return _write(path, {0: raw}, len(raw))
        finally:
            os.close(header)
    blank = blank_of(tuple(datasets))
    parts = {at: memoryview(raw) for at, raw in blank.metadata.items()}
    parts |= {at: _bytes(arrays[d.path]) for d, at in zip(datasets, blank.places, strict=True) if d.path in arrays}
    return replace(_write(path, parts, blank.size), start=_together(datasets, blank.places))


def _together(datasets: Sequence[Dataset], places: Sequence[int]) -> int | None:
    """Return where the first dataset lies if each begins where the one before ends, else None."""
    at = places[0]
    for dataset, place in zip(datasets, places, strict=True):
        if place != at:
            return None  # another libhdf5 may allocate in another way: readers then ask HDF5
        at += _num_bytes(dataset)
    return places[0]


def _num_bytes(dataset: Dataset) -> int:
    return math.prod(dataset.shape) * bits_of(dataset.dtype).itemsize


def hdf5_image(build: Callable[[h5py.File], None]) -> bytes:
    """Return an HDF5 file that has only what `build` puts in: attributes, virtual datasets.

    libhdf5 fills memory, without a file beneath that could fail: it can then not close, and crashes at exit.
    """
    with h5py.File("image", "w", driver="core", backing_store=False, libver=_LIBVER, track_order=False) as file:
        build(file)
        file.flush()
        image: bytes = file.id.get_file_image()
    return image


def fill_file(path: Path, datasets: list[Dataset], arrays: Mapping[str, np.ndarray[Any, Any]]) -> int | None:
    """Put arrays into the holes that `write_file` left for them, and sync; return the file's `start`.

    Raises: OSError, KeyError.
    """
    with open_hdf5(path) as hdf5:  # asked of the file, so that two ranks with unlike HDF5 versions agree
        places = [int(hdf5[dataset.path].id.get_offset()) for dataset in datasets]
    with path.open("r+b") as file:
        for dataset, place in zip(datasets, places, strict=True):
            if dataset.path in arrays:
                file.seek(place)
                for chunk in _chunks(_bytes(arrays[dataset.path])):
                    file.write(chunk)
        _sync(file)
    return _together(datasets, places)


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


def _write(path: Path, parts: Mapping[int, memoryview], size: int) -> FileEntry:
    """Write a file of `size` bytes from `parts` by their place, from front to back; what lies between is a hole."""
    digest, at, pushed, nothing = xxhash.xxh3_128(), 0, 0, bytes(CHUNK_BYTES)
    with path.open("xb") as file:
        for place in [*sorted(parts), size]:
            while at < place:
                count = min(CHUNK_BYTES, place - at)
                digest.update(nothing[:count])
                at = file.seek(count, os.SEEK_CUR)
            for piece in _chunks(parts.get(place, memoryview(b""))):
                digest.update(piece)
                file.write(piece)
                at += len(piece)
                if at - pushed >= PUSH_BYTES:
                    os.posix_fadvise(file.fileno(), pushed, at - pushed, os.POSIX_FADV_DONTNEED)
                    pushed = at
        file.truncate(size)  # where the end is a hole
        _sync(file)
    return FileEntry(path.name, size, digest.hexdigest())


def _bytes(array: np.ndarray[Any, Any]) -> memoryview:
    """View a contiguous array's bytes, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def _chunks(raw: memoryview) -> Iterator[memoryview]:
    return (raw[at : at + CHUNK_BYTES] for at in range(0, len(raw), CHUNK_BYTES))


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
