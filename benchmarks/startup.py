"""Count what a start asks of MPI and of torch's store as ranks grow, and time it beside `import torch`.

    python benchmarks/startup.py [--ranks 8 16 32 64] [--repeat 3]

Counts are those of a rank, from mpi4py's import to open groups (tp 2, pp 2, dp the rest): MPI
calls, operations on the store, keys in it, communicators. An MPI collective takes O(log n) steps, so a start takes
O(log n) where the calls of a rank do not grow. Times are those of 8 ranks: from mpirun to the
first action of the first step, to the end of a run of that step, and mpirun of `import torch` alone, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

TP, PP = 2, 2
JOB = """
[model]
layers = 8
hidden = 512
heads = 8
seq = 256
vocab = 8192
[layout]
tp = 2
pp = 2
[train]
global_batch = 8
steps = 1
precision = "fp32"
[data]
store = "STORE"
"""


def worker() -> None:
    """Start as a run does, and let rank 0 print the largest counts over ranks."""
    import torch.distributed as dist
    from mpi4py import MPI

    from hpcpar.comm import bootstrap
    from hpcpar.comm.groups import open_groups
    from hpcpar.config.surroundings import Surroundings
    from hpcpar.layout.mesh import Mesh

    called: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    stores: list[Any] = []

    class Counted(MPI.Intracomm):
        """The communicators made from one are such as well."""

        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            if callable(found) and not name.startswith(("_", "Get_", "is_")):  # those ask nobody
                called[name] += 1
            return found

        def Split_type(self, *args: Any, **options: Any) -> MPI.Intracomm:  # mpi4py's own returns a plain one
            return Counted(super().Split_type(*args, **options))

    class CountedStore(dist.Store):
        """Torch's C++ asks the methods that this Python has."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__()
            self.inner = opened(*args, **options)
            self.port = self.inner.port
            stores.append(self)  # C++ finds the methods of an object that lives only

    def passed_on(name: str) -> Callable[..., Any]:
        def ask(self: Any, *args: Any) -> Any:
            asked[name] += 1
            return getattr(self.inner, name)(*args)
        return ask

    for name in ("get", "set", "add", "wait", "compare_set", "check", "delete_key", "append", "multi_get", "multi_set"):
        setattr(CountedStore, name, passed_on(name))
    opened = bootstrap.TCPStore
    bootstrap.TCPStore = CountedStore  # type: ignore[misc, assignment]
    MPI.COMM_WORLD = Counted(MPI.COMM_WORLD)  # type: ignore[misc]
    world = bootstrap.connect(Surroundings.read(os.environ))
    bootstrap.open_process_group(world)
    groups = open_groups(Mesh(PP, world.size // (TP * PP), 1, TP), world.rank)
    made = sum(called[name] for name in ("Dup", "Split", "Split_type", "Create_group")) - called["Free"]
    told = world.control.all_gather((sum(called.values()), sum(asked.values()), made))
    if world.rank == 0:
        most = [max(column) for column in zip(*told, strict=True)]
        print(f"| {world.size} | {most[0]} | {most[1]} | {stores[0].inner.num_keys()} | {most[2]} |", flush=True)
    groups.close()
    bootstrap.close_process_group()


def seconds_of(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def timed(repeat: int) -> str:
    ranks = ["mpirun", "-n", "8"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(["hpcpar", "data", "build", str(Path(__file__).parent), "--vocab", "2048", "--out",
                        str(folder / "store")], check=True, capture_output=True)
        (folder / "job.toml").write_text(JOB.replace("STORE", str(folder / "store")))
        found: dict[str, list[float]] = {"import torch": [], "first step begun": [], "run of one step ended": []}
        for turn in range(repeat):
            found["import torch"].append(seconds_of([*ranks, sys.executable, "-c", "import torch"]))
            run, start = folder / f"run{turn}", time.time()
            whole = seconds_of([*ranks, "hpcpar", "train", str(folder / "job.toml"), "--run", str(run)])
            timelines = json.loads((run / "timeline.json").read_text())["ranks"]
            begun = min(event[1] for timeline in timelines for event in timeline["events"]) - start
            found["first step begun"].append(begun)
            found["run of one step ended"].append(whole)
    unit = statistics.median(found["import torch"])
    return "\n".join(f"8 ranks, {what}: {(middle := statistics.median(seconds)):.1f} s "
                     f"({', '.join(f'{t:.1f}' for t in seconds)}), {middle / unit:.2f} times import torch"
                     for what, seconds in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker()
        return
    print("| ranks | MPI calls a rank | store operations a rank | keys | communicators a rank |\n|---|---|---|---|---|",
          flush=True)
    for ranks in args.ranks:
        subprocess.run(["mpirun", "-n", str(ranks), sys.executable, __file__, "--worker"], check=True)
    print(timed(args.repeat))


if __name__ == "__main__":
    main()
