"""What a node is worth: its devices, memory, disk and clock, how fast it multiplies, and its links to other nodes.

    srun --ntasks-per-node=1 --mpi=pmi2 python -m hpcpar.probe RUN/submit/nodes          before the ranks start

Each task leaves NODE.json there: first what it can find out alone, then also its clock and links, over MPI. So a node
that hangs in its driver is known by what it did not write. `submit/health` judges.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcpar.config.surroundings import Surroundings

MATMUL_S, DISK_S = 0.5, 1.0  # of each measurement, at least one try
_SIZE = 128  # of a CPU core's matrices: a try is shorter than a slice of the scheduler's
_GPU_SIZE = 8192
_MESSAGE = 4 << 20  # bytes
_TRIES = 4


def measure(gpus: bool) -> dict[str, float]:
    """Return this node's own figures, in the words of `submit/health`. `gpus`: look for them.

    The best of several tries: another process's share of a core must not look like a slow node. Cost: a second, with
    GPUs some ten.
    """
    found = {"memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2**30,
             "room": shutil.disk_usage(tempfile.gettempdir()).free / 2**30, "disk": 16 * _best(_write, DISK_S),
             "devices": 0.0}
    # torch is imported only where there is a device: its import is most of a CPU node's prologue
    if gpus and (any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()):
        return found | _measure_gpus()
    import numpy as np

    a = np.ones((_SIZE, _SIZE), np.float32)
    # one thread: the BLAS library's own would wait for one another where a task has a single core
    return found | {"matmul": 2 * _SIZE**3 / 1e12 * _best(lambda: np.einsum("ij,jk->ik", a, a), MATMUL_S)}


def _measure_gpus() -> dict[str, float]:
    """Return the least figures of all this node's GPUs."""
    import torch

    count = torch.cuda.device_count()
    rates, free, sizes = [], [], []
    for index in range(count):
        torch.cuda.set_device(index)
        left, whole = torch.cuda.mem_get_info()
        free.append(left / whole)
        sizes.append(whole / 2**30)
        a = torch.randn(_GPU_SIZE, _GPU_SIZE, device="cuda").half()

        def multiply(a: torch.Tensor = a) -> None:
            a @ a
            torch.cuda.synchronize()

        rates.append(2 * _GPU_SIZE**3 / 1e12 * _best(multiply, MATMUL_S))
    if not count:
        return {}
    return {"devices": float(count), "matmul": min(rates), "device_free": min(free), "device_memory": min(sizes)}


def _best(work: Callable[[], object], seconds: float) -> float:
    """Return how often a second `work` is done, by the quickest of its runs in so many seconds."""
    work()  # warms up
    times: list[float] = []
    end = time.monotonic() + seconds
    while not times or time.monotonic() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1 / min(times)


def _write() -> None:
    """Write 16 MB to the node's own disk, and wait for it."""
    with tempfile.TemporaryFile() as file:
        file.write(bytes(16_000_000))
        file.flush()
        os.fsync(file.fileno())


def measure_links(communicator: Any, names: list[str]) -> dict[str, float]:
    """Return GB/s to the task before this one and the one after, in a ring; every task must call."""
    rank, size = communicator.Get_rank(), communicator.Get_size()
    out, into = bytearray(_MESSAGE), bytearray(_MESSAGE)
    found = {}
    for other in partners(rank, size):
        communicator.Barrier()
        if other is None:
            continue
        times: list[float] = []
        for _ in range(_TRIES):
            start = time.perf_counter()
            communicator.Sendrecv(out, other, recvbuf=into, source=other)
            times.append(time.perf_counter() - start)
        found[names[other]] = _MESSAGE / 1e9 / min(times)
    return found


def partners(rank: int, size: int) -> list[int | None]:
    """Return with whom a task talks in each of three rounds, so that each pair of neighbours in a ring meets once.

    0-1 2-3 4-5, then 1-2 3-4 5-0; an odd ring closes in the third round.
    """
    first: int | None = rank ^ 1
    second: int | None = rank + 1 if rank % 2 else rank - 1
    third = {0: size - 1, size - 1: 0}.get(rank) if size % 2 and size > 1 else None
    if first == size:
        first = None
    if second in (-1, size):
        second = (size - 1 - rank) if size % 2 == 0 and size > 2 else None
    return [first, second, third]


def main(folder: Path, surroundings: Surroundings) -> None:
    """Measure this node and leave its report."""
    report: dict[str, Any] = {}
    try:
        report.update(measure(surroundings.gpus))
    except Exception as error:  # a broken driver raises anything; the report names it
        report["error"] = f"{type(error).__name__}: {error}"
    _leave(folder, surroundings.node, report)
    from mpi4py import MPI  # starts MPI: after the report, for it may hang

    world = MPI.COMM_WORLD
    if world.Get_size() < surroundings.num_tasks:
        return  # launcher and MPI do not talk; the ranks will say so
    names = world.allgather(surroundings.node)
    world.Barrier()
    report["clock"] = time.time()
    report["links"] = measure_links(world, names)
    _leave(folder, surroundings.node, report)


def _leave(folder: Path, name: str, report: dict[str, Any]) -> None:
    partial = folder / f".{name}"
    partial.write_text(json.dumps(report))
    partial.rename(folder / f"{name}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Surroundings.read(os.environ))
