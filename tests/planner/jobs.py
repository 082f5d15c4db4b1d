"""Published models as resolved jobs."""

from __future__ import annotations

from typing import Any

from hpcpar.config.job import Job
from hpcpar.config.load import job_from_tables
from hpcpar.config.resolve import resolve


def job_of(layers: int, hidden: int, heads: int, tp: int, pp: int, dp: int, batch: int, **more: dict[str, Any]) -> Job:
    """Make a GPT at sequence 2048 on A100s."""
    tables: dict[str, Any] = {
        "model": {"layers": layers, "hidden": hidden, "heads": heads, "seq": 2048, "vocab": 51200},
        "layout": {"tp": tp, "pp": pp, "dp": dp, "recompute": "full"}, "train": {"global_batch": batch},
        "machine": {"gpu": "a100-80g", "nodes": max(1, tp * pp * dp // 8)}}
    for table, values in more.items():
        tables[table] = tables.get(table, {}) | values
    return resolve(job_from_tables(tables), on_paper=True)


def yuan(**more: dict[str, Any]) -> Job:
    """Yuan 1.0 as published."""
    return job_of(76, 16384, 128, 8, 38, 7, 3360, **{"model": {"vocab": 53228}, "train": {"steps": 26158}} | more)


def mt_nlg(dp: int = 8, **more: dict[str, Any]) -> Job:
    """Megatron-Turing NLG 530B."""
    return job_of(105, 20480, 128, 8, 35, dp, 1920, **more)
