"""Plan a save of Yuan-245B on 2128 ranks, on paper: no rank is started, no tensor is made, the index is real.

    python benchmarks/checkpoint_plan.py [--ranks-per-file 1]

What one rank does in a save, what rank 0 does besides, how large manifest and index are; medians of 5 (index: of 3).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcpar.checkpoint import Manifest, latest_set, read_manifest, read_state
from hpcpar.checkpoint.format import MANIFEST, FileEntry, StoredBox, set_name, shard_name
from hpcpar.checkpoint.index import index_image, write_index
from hpcpar.checkpoint.load import load_shards  # noqa: F401  what it imports is not to be timed
from hpcpar.config.load import job_from_tables
from hpcpar.config.resolve import resolve
from hpcpar.layout.layout import Layout
from hpcpar.units import format_bytes

YUAN = {"model": {"kind": "gpt", "layers": 76, "hidden": 16384, "heads": 128, "seq": 2048, "vocab": 53228},
        "layout": {"tp": 8, "pp": 38, "dp": 7}, "train": {"global_batch": 3360}}
KINDS = {"weight": "float32", "exp_avg": "float32", "exp_avg_sq": "float32"}


def seconds(work: Callable[[], Any], times: int = 5) -> float:
    """Return the median time of some runs."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def plan(layout: Layout, global_rank: int) -> tuple[StoredBox, ...]:
    return tuple(StoredBox(piece.parameter.name, piece.box) for piece in layout.stored_pieces(global_rank))


def whole_plan(layout: Layout, ranks_per_file: int) -> Manifest:
    """Return the set's manifest, with the sizes of the values for the files' sizes."""
    files = []
    for number, first in enumerate(range(0, layout.mesh.size, ranks_per_file)):
        ranks = range(first, min(first + ranks_per_file, layout.mesh.size))
        boxes = {rank: found for rank in ranks if (found := plan(layout, rank))}
        listed = tuple(box for found in boxes.values() for box in found)
        if listed:
            size = sum(box.box.numel for box in listed) * 4 * len(KINDS)
            files.append(FileEntry(shard_name(number), size, f"{number:032x}", ranks=tuple(boxes), boxes=listed))
    return Manifest(100, KINDS, {p.name: p.shape for p in layout.table}, tuple(files), {"step": 100})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks-per-file", type=int, default=1)
    k = parser.parse_args().ranks_per_file
    job = resolve(job_from_tables(YUAN))
    manifest = whole_plan(Layout(job), k)
    fullest = max(manifest.files, key=lambda file: file.size)
    sizes = sorted(file.size for file in manifest.files)
    raw = manifest.to_bytes()
    rows = [("one rank: its own plan", seconds(lambda: plan(Layout(job), fullest.ranks[0]))),
            ("rank 0: everyone's plan", seconds(lambda: whole_plan(Layout(job), k))),
            ("rank 0: manifest to bytes", seconds(manifest.to_bytes)),
            ("any rank: manifest from bytes", seconds(lambda: Manifest.from_bytes(raw, "")))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / set_name(100)

        def index() -> None:
            path.mkdir(exist_ok=True)
            (path / "model.h5").unlink(missing_ok=True)
            write_index(path, index_image(manifest), manifest.step)

        rows.append(("rank 0: model.h5, written and synced", seconds(index, 3)))
        index_bytes = (path / "model.h5").stat().st_size
        (path / MANIFEST).write_bytes(raw)
        rows += [("rank 0 at start: which set is the newest", seconds(lambda: latest_set(Path(folder)))),
                 ("rank 0 at start: its state", seconds(lambda: read_state(path))),
                 ("any rank at start: its manifest", seconds(lambda: read_manifest(path)))]
    num_boxes = sum(len(file.boxes) for file in manifest.files)
    print(f"{layout_line(job)}: {len(manifest.files)} shard files, {format_bytes(sum(sizes))}; bytes a file: "
          f"{format_bytes(sizes[0])} to {format_bytes(sizes[-1])}, median {format_bytes(statistics.median(sizes))}; "
          f"{num_boxes:,} boxes; manifest {format_bytes(len(raw))}; model.h5 {format_bytes(index_bytes)}")
    for what, taken in rows:
        print(f"| {what} | {taken * 1000:,.1f} ms |")


def layout_line(job: Any) -> str:
    layout = job.layout
    return f"tp {layout.tp} x pp {layout.pp} x dp {layout.dp} = {job.world_size} ranks"


if __name__ == "__main__":
    main()
