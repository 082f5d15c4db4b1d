"""Memory that the ranks of a host share: part of `mpi_backend`."""

from __future__ import annotations

import mmap
import os
import threading
import uuid
from pathlib import Path

from mpi4py import MPI

_FOLDER = Path("/dev/shm")


class Fence:
    """Orders all that was read and written before a call against all that comes after: a release, then an acquire.

    Python has no other portable one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self) -> None:
        """Be a full fence: the second acquire comes after the first release, for both are of one lock."""
        with self._lock:
            pass
        with self._lock:
            pass


def map_together(comm: MPI.Comm, num_bytes: int, spare: float = 0.0) -> mmap.mmap | None:
    """Map a zeroed file that rank 0 makes and unlinks again; None for all ranks where one of them could not.

    `spare`: the share of the folder that must be free after it. Ranks that ask for different sizes (their collectives
    do not match) get none either.
    """
    made = (_make_file(num_bytes, spare), num_bytes) if comm.rank == 0 else None
    path, size = comm.bcast(made)
    memory = None
    if path is not None and size == num_bytes:
        try:
            with path.open("r+b") as file:
                memory = mmap.mmap(file.fileno(), num_bytes)
        except OSError:  # in a container with a folder of its own
            memory = None
    everyone = comm.allreduce(int(memory is not None), MPI.MIN)
    if path is not None and comm.rank == 0:
        path.unlink()  # the memory lives as long as somebody has it mapped
    return memory if everyone else None


def _make_file(num_bytes: int, spare: float) -> Path | None:
    path = _FOLDER / f"mpi4py-backend-{uuid.uuid4().hex}"
    try:
        room = os.statvfs(_FOLDER)
        if room.f_bavail * room.f_frsize - num_bytes < spare * room.f_blocks * room.f_frsize:
            return None
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return None
    try:
        os.posix_fallocate(fd, 0, num_bytes)  # a full folder is found now, not by a bus error later
    except OSError:
        path.unlink()
        return None
    finally:
        os.close(fd)
    return path
