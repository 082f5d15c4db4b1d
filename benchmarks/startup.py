"""Count what a start asks of MPI and of torch's store as ranks grow, and time it beside `import torch`.

    python benchmarks/startup.py [--ranks 8 16 32 64] [--repeat 3]

Counts are those of a rank, from mpi4py's import to open groups (tp 2, pp 2, dp the rest, hybrid sharding over 2): MPI
calls, operations on the store, keys in it, communicators. An MPI collective takes O(log n) steps, so a start takes
O(log n) where the calls of a rank do not grow. Times are those of 8 ranks: from mpirun to the end of the first step,
and mpirun of `import torch` alone, in turns.
"""

from __future__ import annotations

import argparse
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

TP, PP, INNER = 2, 2, 2
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

    from hpcpar.comm.bootstrap import connect, open_process_group
    from hpcpar.comm.groups import open_groups
    from hpcpar.config.surroundings import Surroundings
    from hpcpar.layout.mesh import Mesh

    calls: Counter[str] = Counter()

    def note(frame: object, event: str, called: Any) -> None:
        if event == "c_call" and "mpi4py" in type(getattr(called, "__self__", None)).__module__:
            calls[called.__name__] += 1

    asked: Counter[str] = Counter()
    counted = ("get", "set", "add", "wait", "compare_set", "check", "delete_key", "multi_get", "multi_set")
    opened = dist.TCPStore

    class Counting(opened):  # type: ignore[misc, valid-type]
        """Torch asks it through Python, and so is counted."""

    def counting(name: str) -> Callable[..., Any]:
        def ask(self: Any, *args: Any) -> Any:
            asked[name] += 1
            return getattr(opened, name)(self, *args)
        return ask

    for name in counted:
        setattr(Counting, name, counting(name))
    from hpcpar.comm import bootstrap
    bootstrap.TCPStore = Counting  # type: ignore[misc]
    sys.setprofile(note)
    world = connect(Surroundings.read(os.environ))
    open_process_group(world)
    groups = open_groups(Mesh(PP, world.size // (TP * PP), 1, TP, INNER), world.rank)
    sys.setprofile(None)
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    keys = store.num_keys()
    told = world.control.all_gather((sum(calls.values()), sum(asked.values()), len(groups.opened)))
    if world.rank == 0:
        most = [max(column) for column in zip(*told, strict=True)]
        print(f"| {world.size} | {most[0]} | {most[1]} | {keys} | {most[2]} |", flush=True)
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
        found: dict[str, list[float]] = {"torch": [], "step": []}
        for turn in range(repeat):
            found["torch"].append(seconds_of([*ranks, sys.executable, "-c", "import torch"]))
            run = ["--run", str(folder / f"run{turn}")]
            found["step"].append(seconds_of([*ranks, "hpcpar", "train", str(folder / "job.toml"), *run]))
    torch_s, step_s = (statistics.median(found[what]) for what in ("torch", "step"))
    return (f"8 ranks: import torch {torch_s:.1f} s ({', '.join(f'{t:.1f}' for t in found['torch'])}); to the end of a "
            f"run of one step, its checkpoint saved: {step_s:.1f} s ({', '.join(f'{t:.1f}' for t in found['step'])}): "
            f"{step_s / torch_s:.2f} times")


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
