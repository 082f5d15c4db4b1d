"""Random jobs against the rules: `python -m tests.planner.random_jobs 10000` is the whole campaign.

An illegal job is refused in under a second with field, rule and the nearest legal value; an accepted one builds its
layout, with exactly the layers asked for, and a plan.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as some

from hpcpar.config.load import job_from_tables
from hpcpar.config.resolve import resolve
from hpcpar.errors import UserError
from hpcpar.layout.layout import Layout
from hpcpar.layout.schedule import Kind
from hpcpar.planner.plan import make_plan

FEW = some.sampled_from([1, 1, 1, 2, 2, 3, 4, 6, 8])
TABLES = some.fixed_dictionaries({
    "model": some.fixed_dictionaries({
        "kind": some.sampled_from(["gpt", "llama"]), "layers": some.integers(1, 40),
        "hidden": some.sampled_from([64, 96, 192, 256, 1024, 1000, 4096]),
        "heads": some.sampled_from([1, 2, 3, 4, 8, 12, 16, 64]), "seq": some.sampled_from([1, 60, 64, 128, 2048]),
        "vocab": some.integers(2, 60000), "tied": some.booleans(),
    }, optional={"kv_heads": some.sampled_from([1, 2, 4, 5, 8]), "ffn": some.sampled_from([64, 100, 768, 11008])}),
    "layout": some.fixed_dictionaries({
        "tp": FEW, "pp": FEW, "cp": some.sampled_from([1, 1, 1, 2]), "ep": some.sampled_from([1, 1, 1, 1, 2]),
        "chunks": some.sampled_from([1, 1, 2, 2, 3]), "zero": some.integers(0, 3),
        "schedule": some.sampled_from(["gpipe", "1f1b", "interleaved", "breadth-first", "zero-bubble", "zbv",
                                       "dualpipev", "pipedream", "table"]),
        "sequence_parallel": some.booleans(), "recompute": some.sampled_from(["none", "selective", "full", "offload"]),
        "tp_overlap": some.sampled_from([1, 1, 1, 2]),
    }, optional={"dp": FEW}),
    "train": some.fixed_dictionaries({
        "global_batch": some.sampled_from([1, 8, 24, 48, 96, 100, 192]), "microbatch": some.sampled_from([1, 1, 2, 3]),
        "precision": some.sampled_from(["fp64", "fp32", "bf16", "fp16"])}),
    "machine": some.fixed_dictionaries({"gpu": some.sampled_from(["cpu", "a100-80g", "h100-80g", "a100"]),
                                        "nodes": some.integers(1, 8)}),
})
LOT = 500  # jobs of a campaign: hypothesis keeps all that it has tried
SLOW = 1.0  # seconds to a refusal at most, by the processor's clock


def check(tables: dict[str, Any]) -> str:
    """Hold one job against the rules; return what became of it."""
    start = time.process_time()
    try:
        job = resolve(job_from_tables(tables), on_paper=True)
        plan = make_plan(job)
    except UserError as refusal:
        assert time.process_time() - start < SLOW, tables
        table, _, field = refusal.where.partition(".")
        assert table in tables, refusal
        assert field or table == "layout", refusal  # "layout" alone: the whole mesh against the machine
        assert refusal.rule, refusal
        assert refusal.fix, refusal
        return "refused " + refusal.where
    layout = Layout(job)
    held = sorted(layer for layers in layout.stages for layer in layers)
    assert held == list(range(job.model.layers))
    assert all(layers for layers in layout.stages)
    programs = [layout.program(rank, layout.num_microbatches) for rank in range(job.layout.pp)]
    forwards = sum(action.kind is Kind.FORWARD for program in programs for action in program)
    assert forwards == layout.num_microbatches * job.layout.pp * job.layout.chunks
    assert all(layout.buckets(rank, job.layout.tp - 1) for rank in range(job.layout.pp))
    assert math.isfinite(plan.time.total)
    assert plan.time.total > 0
    assert 0 < plan.mfu <= 1.0
    assert all(memory.total > 0 for memory in plan.memory)
    return "built"


def campaign(num_jobs: int, number: int = 0) -> Counter[str]:
    """Check that many random jobs, others for each number of a campaign; count what became of them."""
    seen: Counter[str] = Counter()

    @seed(number)
    @settings(max_examples=num_jobs, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
              suppress_health_check=list(HealthCheck))
    @given(TABLES)
    def one(tables: dict[str, Any]) -> None:
        seen[check(tables)] += 1

    one()
    return seen


def main() -> None:
    """Run campaigns of LOT jobs, and print what became of all of them as a table."""
    total, start = int(sys.argv[1]), time.monotonic()
    seen: Counter[str] = Counter()
    for number in range(-(-total // LOT)):
        seen += campaign(min(LOT, total - number * LOT), number)
        print(f"{seen.total():,} jobs, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    print(f"| {seen.total():,} random jobs | outcome |\n|---|---|")
    for outcome, count in seen.most_common():
        print(f"| {count:,} | {outcome} |")


if __name__ == "__main__":
    main()
