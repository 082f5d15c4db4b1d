"""Read the values of one shard file: all of it while its checksum is taken, or only what is wanted.

    file on disk   | metadata |aaaaaaaa|bbbbbbbb|cccccccc| metadata |
    read_verified    hash      hash, put hash     hash, put  hash         one pass; values go straight to their place
    read_wanted                put               put                      for files that another rank verifies

Neither asks libhdf5 where the values are: the manifest says it. Compressed files are verified first, then opened.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import xxhash

from hpcpar.checkpoint.format import BFLOAT16, FileEntry, Manifest, StoredBox, bits_of, dataset_path
from hpcpar.checkpoint.store import hdf5_plugin, hdf5_type, open_hdf5
from hpcpar.checkpoint.verify import verify_set
from hpcpar.errors import CheckpointError
from hpcpar.layout.boxes import Box

Array = np.ndarray[Any, Any]
# a read: long enough for the disk, short enough to be hashed from a core's cache
CHUNK_BYTES = 1 << 20
# asked of the disk before it is needed: several reads are under way at any time
AHEAD_BYTES = 64 << 20
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Wanted:
    """A box to be read, and where to: an array of the box's shape for every kind."""

    tensor: str
    box: Box
    into: Mapping[str, Array]


@dataclass(frozen=True)
class Read:
    """The part of one stored box that goes into one wanted box."""

    stored: Box
    common: Box
    wanted: Wanted


class _Put(NamedTuple):
    """Values to be taken from a dataset: the part of the stored box, and where it goes (a view of its shape)."""

    part: Box  # relative to the stored box
    into: Array


def read_verified(path: Path, manifest: Manifest, entry: FileEntry, reads: Sequence[Read]) -> int:
    """Read a file of the set at `path` and check it on the way; return the bytes read.

    Raises: CheckpointError if size or checksum are not those of the manifest; the arrays then hold rubbish.
    """
    if entry.start is None:
        verify_set(path, [entry.name])
        return read_wanted(path, manifest, entry, reads)
    try:
        found = _read_all(path / entry.name, manifest, entry, reads)
    except OSError:
        found = (0, "")
    if found != (entry.size, entry.checksum):
        verify_set(path, [entry.name])  # which words the error
        raise CheckpointError(f"{path / entry.name}: gave other bytes when it was read again")
    return entry.size


def ask_ahead(file: Path) -> None:
    """Have the disk fetch a file's beginning while its reader still plans; what is wrong with it, the reader tells."""
    with suppress(OSError), _open(file) as (descriptor, _):
        os.posix_fadvise(descriptor, 0, 2 * AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


def _read_all(file: Path, manifest: Manifest, entry: FileEntry, reads: Sequence[Read]) -> tuple[int, str]:
    """Read a file from front to back and put what is wanted in place; return its size and checksum."""
    digest, at, wanted = xxhash.xxh3_128(), 0, _by_box(reads)
    with _open(file) as (descriptor, size):
        if size != entry.size:
            return size, ""
        for place, num_bytes, kind, stored in manifest.places(entry):
            for chunk in _stream(descriptor, at, place - at):
                digest.update(chunk)
            dtype, at = manifest.dtype(kind, stored.tensor), place + num_bytes
            for chunk in _take(descriptor, place, stored.box.size or (1,), dtype, _puts(wanted, kind, stored)):
                digest.update(chunk)
        for chunk in _stream(descriptor, at, size - at):
            digest.update(chunk)
    return size, digest.hexdigest()


def read_wanted(path: Path, manifest: Manifest, entry: FileEntry, reads: Sequence[Read]) -> int:
    """Read only what is wanted from a file that is verified, before or meanwhile; return the bytes read."""
    file, total = path / entry.name, 0
    if entry.start is None:
        return _through_hdf5(file, manifest, reads) if reads else 0
    wanted = _by_box(reads)
    picks = [(place, stored.box.size or (1,), put, manifest.dtype(kind, stored.tensor))
             for place, _, kind, stored in manifest.places(entry) if stored in wanted
             for put in _puts(wanted, kind, stored)]
    with _reporting(file), _open(file) as (descriptor, _):
        for place, size, put, dtype in picks:
            _ask_ahead(descriptor, place, size, put.part, dtype)
        for place, size, put, dtype in picks:
            total += _pick(descriptor, place, size, put, dtype)
    return total


def _ask_ahead(descriptor: int, place: int, stored: tuple[int, ...], part: Box, dtype: str) -> None:
    """Have the disk fetch a part, if its rows are whole or so short that `_pick` reads whole ones: parts are small."""
    itemsize = bits_of(dtype).itemsize
    row_bytes = math.prod(stored[1:]) * itemsize
    if part.size[1:] == stored[1:] or math.prod(part.size[1:]) * itemsize < PAGE_BYTES:
        os.posix_fadvise(descriptor, place + part.offset[0] * row_bytes, part.size[0] * row_bytes,
                         os.POSIX_FADV_WILLNEED)


def _by_box(reads: Sequence[Read]) -> dict[StoredBox, list[Read]]:
    found: dict[StoredBox, list[Read]] = {}
    for read in reads:
        found.setdefault(StoredBox(read.wanted.tensor, read.stored), []).append(read)
    return found


def _puts(wanted: Mapping[StoredBox, list[Read]], kind: str, stored: StoredBox) -> list[_Put]:
    """List what is wanted of a stored box in a kind; a tensor without dims counts as one of shape [1]."""
    found = []
    for read in wanted.get(stored, []):
        if kind in read.wanted.into:
            offset = tuple(s.start for s in read.common.slices(read.stored))
            into = read.wanted.into[kind]
            found.append(_Put(Box(offset, read.common.size), into[read.common.slices(read.wanted.box)]) if offset else
                         _Put(Box((0,), (1,)), into.reshape(1)))
    return found


def _take(descriptor: int, place: int, stored: tuple[int, ...], dtype: str, puts: list[_Put]) -> Iterator[memoryview]:
    """Read a whole dataset of shape `stored`, put what is wanted in place, and yield all bytes, a chunk at a time."""
    bits = bits_of(dtype)
    if len(puts) == 1 and puts[0].part.size == stored and _is_direct(puts[0].into, dtype):
        yield from _stream(descriptor, place, math.prod(stored) * bits.itemsize, _bytes(puts[0].into))
        return
    for first, rows in _row_blocks(descriptor, place, stored, bits):
        yield _bytes(rows)
        for part, into in puts:
            low, high = max(first, part.offset[0]), min(first + len(rows), part.end[0])
            if low < high:
                values = rows[(slice(low - first, high - first), *part.slices()[1:])]
                put_values(into[low - part.offset[0] : high - part.offset[0]], values, dtype)


def _pick(descriptor: int, place: int, stored: tuple[int, ...], put: _Put, dtype: str) -> int:
    """Read the part of a dataset of shape `stored` that is wanted; return the bytes read.

    A part's rows lie apart in the file. Rows shorter than a page are read with what lies between them, which the disk
    would fetch anyway.
    """
    part, bits = put.part, bits_of(dtype)
    row_bytes = math.prod(stored[1:]) * bits.itemsize
    run_bytes = math.prod(part.size[1:]) * bits.itemsize
    first = place + part.offset[0] * row_bytes
    if part.size[1:] == stored[1:] and _is_direct(put.into, dtype):
        return sum(len(chunk) for chunk in _stream(descriptor, first, part.numel * bits.itemsize, _bytes(put.into)))
    if part.size[1:] == stored[1:] or run_bytes < PAGE_BYTES:
        within = _Put(Box((0, *part.offset[1:]), part.size), put.into)
        return sum(len(raw) for raw in _take(descriptor, first, (part.size[0], *stored[1:]), dtype, [within]))
    inner = Box(part.offset[1:], part.size[1:])
    return sum(_pick(descriptor, first + row * row_bytes, stored[1:], _Put(inner, put.into[row]), dtype)
               for row in range(part.size[0]))


def put_values(into: Array, values: Array, dtype: str) -> None:
    """Copy stored bits to an array, as numbers of its dtype; uint16 takes the bits of bfloat16 as they are."""
    if dtype == BFLOAT16 and into.dtype != values.dtype:
        values = (values.astype("uint32") << 16).view("float32")
    into[...] = values


def _is_direct(into: Array, dtype: str) -> bool:
    """Whether bytes can be read straight into an array."""
    return into.dtype == bits_of(dtype) and into.flags.c_contiguous


def _stream(descriptor: int, at: int, num_bytes: int, into: memoryview | None = None) -> Iterator[memoryview]:
    """Read bytes, into their place or a buffer that is used again, and yield them a chunk at a time."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, num_bytes))) if into is None else into
    for done in range(0, num_bytes, CHUNK_BYTES):
        count = min(CHUNK_BYTES, num_bytes - done)
        chunk = buffer[:count] if into is None else buffer[done : done + count]
        _fill(descriptor, at + done, chunk)
        yield chunk


def _row_blocks(descriptor: int, at: int, shape: tuple[int, ...], bits: np.dtype[Any]) -> Iterator[tuple[int, Array]]:
    """Read a dataset a block of rows at a time, into a buffer that is used again; yield (first row, rows)."""
    rows = shape[0] if shape else 1
    row_bytes = math.prod(shape[1:]) * bits.itemsize
    block = np.empty((max(1, min(rows, CHUNK_BYTES // row_bytes)), *shape[1:]), bits)
    for first in range(0, rows, len(block)):
        found = block[: min(len(block), rows - first)]
        _fill(descriptor, at + first * row_bytes, _bytes(found))
        yield first, found


def _fill(descriptor: int, at: int, into: memoryview) -> None:
    if at // AHEAD_BYTES != (at + len(into)) // AHEAD_BYTES or at < CHUNK_BYTES:
        os.posix_fadvise(descriptor, at, 2 * AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
    while into:
        count = os.preadv(descriptor, [into], at)
        if not count:
            raise OSError(f"ends at byte {at}")
        at, into = at + count, into[count:]


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


@contextmanager
def _open(path: Path) -> Iterator[tuple[int, int]]:
    """Open a file; yield its descriptor and size."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor, os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


@contextmanager
def _reporting(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{file}: {getattr(error, 'strerror', None) or error}") from error


def _through_hdf5(file: Path, manifest: Manifest, reads: Sequence[Read]) -> int:
    """Read hyperslabs of a compressed file; libhdf5 unpacks them."""
    total = 0
    if manifest.compression != "none":
        hdf5_plugin()
    with _reporting(file), open_hdf5(file) as hdf5:
        for read in reads:
            for kind, into in read.wanted.into.items():
                dtype = manifest.dtype(kind, read.wanted.tensor)
                name = dataset_path(kind, read.wanted.tensor, read.stored)
                stored = hdf5[name]
                if stored.shape != read.stored.size or not stored.id.get_type().equal(hdf5_type(dtype)):
                    raise CheckpointError(f"{file}: {name} is {stored.dtype} {stored.shape}, the manifest says "
                                          f"{dtype} {read.stored.size}")
                values = np.empty(read.common.size, bits_of(dtype))
                space = stored.id.get_space()
                start = tuple(s.start for s in read.common.slices(read.stored))
                if start:
                    space.select_hyperslab(start, (1,) * len(start), block=read.common.size)
                stored.id.read(h5py.h5s.create_simple(values.shape or (1,)), space, values, hdf5_type(dtype))
                put_values(into[read.common.slices(read.wanted.box)] if start else into, values, dtype)
                total += values.nbytes
    return total
