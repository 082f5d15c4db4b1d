"""Layouts, shards with known values and ranks as threads, for the checkpoint tests; torch-free."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hpcpar.checkpoint import save_set
from hpcpar.comm.control import Control
from hpcpar.config.load import job_from_tables
from hpcpar.config.resolve import resolve
from hpcpar.layout.layout import Layout

KINDS = ("weight", "exp_avg", "exp_avg_sq")
GPT = {"kind": "gpt", "layers": 3, "hidden": 16, "heads": 4, "seq": 8, "vocab": 53, "tied": True}
UNTIED = {**GPT, "tied": False}
LLAMA = {"kind": "llama", "layers": 5, "hidden": 16, "heads": 4, "kv_heads": 2, "ffn": 24, "seq": 8, "vocab": 37,
         "tied": False}


def make_layout(model: dict[str, Any], tp: int = 1, pp: int = 1, dp: int = 1, zero: Any = 1, **wish: Any) -> Layout:
    tables = {"model": model, "train": {"global_batch": dp * pp, "precision": "fp32"},
              "layout": {"tp": tp, "pp": pp, "dp": dp, "zero": zero, "bucket_mib": 0.003, **wish}}
    return Layout(resolve(job_from_tables(tables), tp * pp * dp))


def reference(kind: str, name: str, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """Element i of a tensor is a hash of (kind, name, i), so that every one is told from every other."""
    index = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(zlib.crc32(f"{kind} {name}".encode()) << 20)
    mixed = (index * np.uint64(0x9E3779B97F4A7C15)) ^ (index >> np.uint64(7))
    return (((mixed >> np.uint64(11)).astype("float64") / 2**53) - 0.5).astype(dtype).reshape(shape)


def shards_of(layout: Layout, rank: int, dtype: str = "float32") -> dict[str, list[np.ndarray]]:
    at = layout.mesh.coordinates(rank)
    buckets = layout.buckets(at.pp_rank, at.tp_rank)
    shards = {kind: [np.zeros(b.numel // layout.num_shards, dtype) for b in buckets] for kind in KINDS}
    for kind, flats in shards.items():
        for p in layout.held_pieces(rank):
            full = reference(kind, p.parameter.name, p.parameter.shape, dtype)
            flats[p.bucket][p.start : p.start + p.box.numel] = full[p.box.slices()].reshape(-1)
    return shards


def assert_equal(found: dict[str, list[np.ndarray]], expected: dict[str, list[np.ndarray]]) -> None:
    assert found.keys() == expected.keys()
    for kind, flats in expected.items():
        for number, flat in enumerate(flats):
            assert found[kind][number].tobytes() == flat.tobytes(), (kind, number)


class Threads(Control):
    """One thread's view of a control plane made of threads."""

    def __init__(self, rank: int, board: list[Any], gate: threading.Barrier):
        self.rank, self.size, self._board, self._gate = rank, len(board), board, gate

    def all_gather(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._gate.wait(30)
        values = list(self._board)
        self._gate.wait(30)
        return values

    def broadcast(self, value: Any) -> Any:
        return self.all_gather(value)[0]

    def largest(self, value: int) -> int:
        return max(self.all_gather(value))

    def barrier(self) -> None:
        self._gate.wait(30)

    def exchange(self, outgoing: Any, incoming: Any) -> None:
        sent = self.all_gather(outgoing)
        for source in {rank for rank, _ in incoming}:
            mine = [raw for target, raw in sent[source] if target == self.rank]
            for raw, (_, into) in zip(mine, [pair for pair in incoming if pair[0] == source], strict=True):
                into[:] = raw
        self.barrier()


def on_ranks(size: int, work: Callable[[Control], Any]) -> list[Any]:
    """Run `work` on every rank; return each one's result, or the exception it raised."""
    board, gate, results = [None] * size, threading.Barrier(size), [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(Threads(rank, board, gate))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a rank is left hanging"
    return results


def try_save(folder: Path, step: int, layout: Layout, dtype: str = "float32", **options: Any) -> list[Any]:
    shards = [shards_of(layout, rank, dtype) for rank in range(layout.mesh.size)]
    return on_ranks(layout.mesh.size, lambda control: save_set(
        folder, step, layout, control.rank, control, shards[control.rank], {"step": step}, **options))


def save(folder: Path, step: int, layout: Layout, dtype: str = "float32", **options: Any) -> Path:
    results = try_save(folder, step, layout, dtype, **options)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results[0]
