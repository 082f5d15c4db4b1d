"""Time the MPI backend beside gloo, MPI's own blocking calls and waiting without sleep, and what waiting costs others.

"in shared": the same backend on tensors that lie in memory of the whole group.

    mpirun -n 8 python benchmarks/mpi_backend.py [--json FILE]

The candidates take turns within every repetition, so that a disturbance of the machine hits them alike; the table
shows medians over the repetitions of the mean over ranks, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch._C._distributed_c10d import AllgatherOptions, ReduceScatterOptions

from hpcpar.comm import mpi_backend
from hpcpar.comm.collectives import zeros_of

COMM = MPI.COMM_WORLD
SIZES = {"1 KiB": (1 << 10, 20), "512 KiB": (512 << 10, 6), "4 MiB": (4 << 20, 3), "32 MiB": (32 << 20, 1)}
Call = Callable[[], object]


def open_groups() -> dict[str, dist.ProcessGroup]:
    """One group of all ranks for each candidate that torch knows."""
    served = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) if COMM.rank == 0 else None
    port = COMM.bcast(served.port if served else None)
    store = served or dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
    mpi_backend.register()
    mpi_backend.register("mpi4py_spin", patience=mpi_backend.Patience(polls=1 << 60))
    dist.init_process_group("gloo", store=store, rank=COMM.rank, world_size=COMM.size)
    return {name: dist.new_group(backend=name) for name in ("gloo", "mpi4py_spin", "mpi4py")}


def torch_calls(group: dist.ProcessGroup, whole: torch.Tensor, part: torch.Tensor) -> dict[str, Call]:
    after, before = (COMM.rank + 1) % COMM.size, (COMM.rank - 1) % COMM.size
    received = torch.empty_like(whole)

    def ring() -> None:
        works = [group.recv([received], before, 0), group.send([whole], after, 0)]
        for work in works:
            work.wait()

    return {
        "all-reduce": lambda: dist.all_reduce(whole, dist.ReduceOp.MAX, group=group),
        "all-gather": lambda: group._allgather_base(whole, part, AllgatherOptions()).wait(),
        "reduce-scatter": lambda: group._reduce_scatter_base(part, whole, ReduceScatterOptions()).wait(),
        "send-recv": ring,
    }


def blocking_calls(whole: torch.Tensor, part: torch.Tensor) -> dict[str, Call]:
    a, b, received = whole.numpy(), part.numpy(), torch.empty_like(whole).numpy()
    after, before = (COMM.rank + 1) % COMM.size, (COMM.rank - 1) % COMM.size
    return {
        "all-reduce": lambda: COMM.Allreduce(MPI.IN_PLACE, a, MPI.MAX),
        "all-gather": lambda: COMM.Allgather(b, a),
        "reduce-scatter": lambda: COMM.Reduce_scatter_block(a, b),
        "send-recv": lambda: COMM.Sendrecv(a, after, 0, received, before, 0),
    }


def interleaved(candidates: dict[str, Call], calls: int, repetitions: int) -> dict[str, float]:
    """Milliseconds a call, for each candidate."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repetitions):
        for name, call in candidates.items():
            call()
            COMM.Barrier()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            mean_s = COMM.allreduce((time.perf_counter() - start) / calls) / COMM.size
            taken[name].append(1e3 * mean_s)
    return {name: statistics.median(times) for name, times in taken.items()}


def compute() -> None:
    values = torch.ones(200_000, dtype=torch.float64)
    for _ in range(200):
        values = (values + 1).sqrt()


def computing_while_others_wait(candidates: dict[str, Call], repetitions: int) -> dict[str, float]:
    """Milliseconds that rank 0 computes while all others wait for it in an all-reduce; and alone, while they sleep."""
    taken: dict[str, list[float]] = {name: [] for name in ["alone", *candidates]}
    for _ in range(repetitions):
        for name in taken:
            COMM.Barrier()
            time.sleep(0.02 if COMM.rank == 0 else 0.02 + 0.4 * (name == "alone"))
            start = time.perf_counter()
            if COMM.rank == 0:
                compute()
            taken[name].append(1e3 * (time.perf_counter() - start))
            if name != "alone":
                candidates[name]()
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    groups = open_groups()
    rows: dict[str, dict[str, float]] = {}
    waits: dict[str, Call] = {}
    for label, (num_bytes, calls) in SIZES.items():
        whole = torch.ones(num_bytes // 4)
        part = torch.ones(num_bytes // 4 // COMM.size)
        tables = {name: torch_calls(group, whole, part) for name, group in groups.items()}
        own = zeros_of(groups["mpi4py"], whole.numel(), whole.dtype, whole.device)
        tables["in shared"] = torch_calls(groups["mpi4py"], own, own[COMM.rank * part.numel():][:part.numel()])
        tables["MPI blocking"] = blocking_calls(whole, part)
        waits = waits or {name: table["all-reduce"] for name, table in tables.items()}
        for operation in ("all-reduce", "all-gather", "reduce-scatter", "send-recv"):
            candidates = {name: table[operation] for name, table in tables.items()}
            rows[f"{operation} {label}"] = interleaved(candidates, calls, args.repetitions)
    rows["one rank computes"] = computing_while_others_wait(waits, args.repetitions)
    if COMM.rank == 0:
        library = MPI.Get_library_version().split("\n")[0][:40]
        print(f"{COMM.size} ranks, {library}; milliseconds".ljust(40), *(name.rjust(13) for name in waits))
        for row, times in rows.items():
            alone = f"  (alone {times['alone']:.0f})" if "alone" in times else ""
            print(row.ljust(40), *(f"{times[name]:13.3f}" for name in waits), alone)
        if args.json:
            args.json.write_text(json.dumps({"ranks": COMM.size, "library": library, "milliseconds": rows}, indent=1))
    dist.destroy_process_group()
    COMM.Barrier()


if __name__ == "__main__":
    main()
