"""Time saving and loading 1 GiB of optimizer state beside raw files, torch.save, safetensors and torch's DCP.

    python benchmarks/checkpoint.py [--folder DIR] [--mib 1024] [--repeat 5] [--ranks 1 8] [--json FILE]

All candidates write the same bytes with the same number of writers to the same disk, every file is synced, and every
load begins with the files dropped from the page cache and fills fresh memory. They take turns within every repetition,
so that a disturbance of the machine hits them alike; the table shows medians. Before each save and load every rank
touches and frees what that may need (the page cache, the arrays, a candidate's copy of them): a virtual machine may
have to ask its host for memory, which can take several times as long as the load.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from hpcpar.checkpoint import load_together, save_set
from hpcpar.checkpoint.dcp import HDF5Reader, HDF5Writer
from hpcpar.checkpoint.memory import Memory, forget, open_memory, recall, remember
from hpcpar.checkpoint.save import save_now
from hpcpar.checkpoint.tasks import InProcess, Saving, Tasks
from hpcpar.comm.bootstrap import World, connect, open_process_group
from hpcpar.config.load import job_from_tables
from hpcpar.config.resolve import resolve
from hpcpar.config.surroundings import Surroundings
from hpcpar.layout.layout import Layout

KINDS = ("exp_avg", "exp_avg_sq", "weight")
LAYOUTS = {1: ((1, 1, 1), (1, 1, 1)), 8: ((2, 2, 2), (1, 4, 2))}  # ranks: (tp, pp, dp) saved, and loaded elsewhere
STEP = 3
Arrays = dict[str, np.ndarray[Any, Any]]


class Candidate(NamedTuple):
    """How one format saves to and loads from a folder; `load` returns what it has filled, `clear` leaves nothing."""

    save: Callable[[Path], object]
    load: Callable[[Path], object]
    clear: Callable[[], object] = lambda: None


def layout_of(mib: int, sizes: tuple[int, int, int]) -> Layout:
    """A GPT whose weights and two moments are about `mib` MiB."""
    hidden, layers = 768, 12
    vocab = max(64, ((mib << 20) // 12 - layers * 12 * hidden * hidden) // hidden)
    tp, pp, dp = sizes
    model = {"layers": layers, "hidden": hidden, "heads": 12, "seq": 256, "vocab": vocab}
    tables = {"model": model, "layout": {"tp": tp, "pp": pp, "dp": dp}, "train": {"global_batch": dp}}
    return Layout(resolve(job_from_tables(tables), tp * pp * dp))


def shards_for(layout: Layout, rank: int) -> dict[str, list[np.ndarray[Any, Any]]]:
    at, draw = layout.mesh.coordinates(rank), np.random.default_rng(rank)
    sizes = [bucket.numel // layout.num_shards for bucket in layout.buckets(at.pp_rank, at.tp_rank)]
    return {kind: [draw.standard_normal(size, dtype=np.float32) for size in sizes] for kind in KINDS}


def sync_all(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as open_file:
                os.fsync(open_file.fileno())


def drop_from_cache(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as open_file:
                os.posix_fadvise(open_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def raw(rank: int, arrays: Arrays) -> Candidate:
    """One file a rank, from front to back in the pieces that were quickest: 1 MiB to write, a whole array to read."""
    piece = 1 << 20

    def save(folder: Path) -> None:
        with (folder / f"{rank}.raw").open("xb", buffering=0) as file:
            for array in arrays.values():
                raw_bytes = memoryview(array).cast("B")
                for at in range(0, len(raw_bytes), piece):
                    file.write(raw_bytes[at:at + piece])
            os.fsync(file.fileno())

    def load(folder: Path) -> object:
        # into as many arrays as everybody's: where memory comes from costs more than the disk on some machines
        found = [np.empty_like(array) for array in arrays.values()]
        with (folder / f"{rank}.raw").open("rb", buffering=0) as file:
            for array in found:
                file.readinto(memoryview(array).cast("B"))
        return found

    return Candidate(save, load)


def in_memory(world: World, layout: Layout, shards: dict[str, list[np.ndarray[Any, Any]]],
              state: dict[str, Any]) -> Candidate:
    """Copies as asynchronous = neighbour keeps them, the ranks played on two hosts; the second loads what it lacks."""
    places: list[Memory] = []

    def save(folder: Path) -> None:
        places[:] = [open_memory(folder, world.control, f"node{2 * world.rank // world.size}")]
        tasks = Tasks(Saving(folder, layout), world.rank, shards)
        for _ in remember(places[0], STEP, state, world.control, InProcess(tasks)):
            pass

    def load(folder: Path) -> object:
        if world.rank == 0:
            shutil.rmtree(places[0].home)  # the first host is lost
        world.control.barrier()
        found = recall(places[0], layout, world.control, 0, print)
        assert found is not None
        return load_together(found, layout, world.control, np.float32)

    return Candidate(save, load, lambda: forget(places[0]))


def candidates(world: World, layout: Layout, other: Layout) -> dict[str, Candidate]:
    rank, shards = world.rank, shards_for(layout, world.rank)
    arrays = {f"r{rank}.{kind}.{n}": flat for kind, flats in shards.items() for n, flat in enumerate(flats)}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    state = {"job": None}

    def empty() -> dict[str, torch.Tensor]:
        return {name: torch.empty_like(tensor) for name, tensor in tensors.items()}

    def synced(write: Callable[[Path], object], name: str) -> Callable[[Path], object]:
        def save(folder: Path) -> None:
            write(folder / name)
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
        return save

    def load_dcp(reader: Callable[[Path], Any]) -> Callable[[Path], object]:
        def load(folder: Path) -> object:
            found = empty()
            dcp.load(found, storage_reader=reader(folder / "dcp"))
            return found
        return load

    tasks = Tasks(Saving(Path(), layout), rank, shards)  # kept from save to save, as the trainer's writer does

    def save_again(folder: Path) -> None:
        tasks.saving = tasks.saving._replace(checkpoints=folder)
        save_now(tasks, STEP, world.control, state)

    def hpcpar(into: Layout) -> Candidate:
        return Candidate(save_again, lambda folder: load_together(folder / f"step-{STEP:08d}", into, world.control,
                                                                  np.float32))

    found = {
        "raw": raw(rank, arrays),
        "hpcpar": hpcpar(layout),
        "hpcpar, a run's first save": hpcpar(layout)._replace(
            save=lambda folder: save_set(folder, STEP, layout, rank, world.control, shards, state)),
        "torch.save": Candidate(synced(lambda file: torch.save(tensors, file), f"{rank}.pt"),
                                lambda folder: torch.load(folder / f"{rank}.pt", weights_only=True)),
        # its tensors are views of the mapped file: cloned, so that they are memory like everybody's
        "safetensors": Candidate(synced(lambda file: save_file(tensors, file), f"{rank}.safetensors"),
                                 lambda folder: {name: tensor.clone() for name, tensor in
                                                 load_file(folder / f"{rank}.safetensors").items()}),
        "torch DCP": Candidate(lambda folder: dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder / "dcp")),
                               load_dcp(dcp.FileSystemReader)),
        "DCP over HDF5Writer": Candidate(lambda folder: dcp.save(tensors, storage_writer=HDF5Writer(folder / "dcp")),
                                         load_dcp(HDF5Reader)),
    }
    if other.mesh != layout.mesh:
        found["hpcpar, loaded at " + str(LAYOUTS[world.size][1])] = hpcpar(other)
        found["hpcpar, in two hosts' memory, one lost"] = in_memory(world, layout, shards, state)
    return found


def measure(world: World, repeat: int, mib: int, where: Path) -> dict[str, Any]:
    """Return seconds of every save and load by candidate, and the bytes."""
    layout, other = (layout_of(mib, sizes) for sizes in LAYOUTS[world.size])
    chosen = candidates(world, layout, other)
    own = sum(flat.nbytes for flats in shards_for(layout, world.rank).values() for flat in flats)
    seconds: dict[str, dict[str, list[float]]] = {name: {"save": [], "load": []} for name in chosen}

    def timed(work: Callable[[Path], object], folder: Path) -> float:
        np.ones(3 * own, np.uint8)
        world.control.barrier()
        start = time.perf_counter()
        kept = work(folder)
        world.control.barrier()
        took = time.perf_counter() - start
        del kept
        return took

    for turn in range(repeat):
        # another order every time, the same on all ranks: what the one before left in memory slows the next by half
        for name in random.Random(turn).sample(list(chosen), len(chosen)):
            candidate = chosen[name]
            folder = where / name.replace(" ", "_").replace(",", "").replace("'", "")
            if world.rank == 0:
                os.sync()  # what the one before left to the disk is not this one's
                folder.mkdir()
            seconds[name]["save"].append(timed(candidate.save, folder))
            if world.rank == 0:
                sync_all(folder)
                drop_from_cache(folder)
            seconds[name]["load"].append(timed(candidate.load, folder))
            candidate.clear()
            if world.rank == 0:
                shutil.rmtree(folder)
    return {"bytes": sum(world.control.all_gather(own)), "seconds": seconds}


def table(found: dict[str, Any], ranks: int) -> str:
    medians = {name: {what: statistics.median(times) for what, times in both.items()}
               for name, both in found["seconds"].items()}
    lines = [f"{found['bytes'] / 2**30:.2f} GiB, {ranks} ranks",
             "| | save s | of raw's speed | load s | of raw's speed | saves (all) | loads (all) |",
             "|---|---|---|---|---|---|---|"]
    for name, both in medians.items():
        every = found["seconds"][name]
        cells = [name]
        for what in ("save", "load"):
            cells += [f"{both[what]:.2f}", f"{medians['raw'][what] / both[what]:.2f}"]
        cells += [" ".join(f"{t:.2f}" for t in every[what]) for what in ("save", "load")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to be measured (here)")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8], choices=list(LAYOUTS))
    parser.add_argument("--json", type=Path, help="keep every time")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is")
    if args.worker:
        world = connect(Surroundings.read(os.environ))
        torch.set_num_threads(1)
        if world.size > 1:
            open_process_group(world)
        found = measure(world, args.repeat, args.mib, args.folder)
        if world.rank == 0:
            args.json.write_text(json.dumps(found))
        return
    everything = {}
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.folder) as folder:
            answer = Path(folder) / "answer.json"
            launch = ["mpirun", "-n", str(ranks)] if ranks > 1 else []
            subprocess.run([*launch, sys.executable, __file__, "--worker", "--folder", folder, "--mib", str(args.mib),
                            "--repeat", str(args.repeat), "--json", str(answer)], check=True)
            everything[str(ranks)] = json.loads(answer.read_text())
        print(table(everything[str(ranks)], ranks), flush=True)
    if args.json:
        args.json.write_text(json.dumps(everything))


if __name__ == "__main__":
    main()
