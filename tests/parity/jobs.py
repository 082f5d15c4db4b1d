"""Jobs that cover all pairs of what may interact, and the full product."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from hpcpar.config.job import Job
from hpcpar.config.load import override
from hpcpar.config.resolve import resolve
from hpcpar.errors import UserError

MESHES = [(t, p, n // t // p) for n in (1, 2, 4, 8) for t in (1, 2, 4, 8) for p in (1, 2, 4, 8) if n % (t * p) == 0]
FACTORS: dict[str, list[Any]] = {
    "mesh": MESHES,
    "schedule": ["1f1b", "gpipe"],
    "sequence_parallel": [True, False],
    "tp_overlap": [1, 2],
    "tied": [True, False],
    "kind": ["gpt", "llama"],
    "vocab": [64, 61],
    "spare_layers": [0, 1],  # beyond max(2, pp x chunks): with 1 the stages are uneven
    "kv_heads": [8, 2],  # 2 is fewer than tp 4 and 8
    "clip": [0.05, 0.0],  # active at every step, or off
    "accumulation": [1, 2],
    "recompute": ["none", "selective", "full", "offload"],
    "dropout": [0.0, 0.1],
    "zero": [1, 0, 3, 2],
    "ramp": [False, True],
    "z_loss": [0.0, 0.01],
    "qk_norm": [False, True],
    "embedding_grad": [1.0, 0.1],
}
STABILISERS = ("z_loss", "qk_norm", "embedding_grad")
Choice = dict[str, Any]
SCHEDULES = ["1f1b", "gpipe", "interleaved", "breadth-first", "zero-bubble", "zbv", "dualpipev"]
CHUNKS = {"interleaved": 2, "breadth-first": 2, "zbv": 2, "dualpipev": 2}


def all_pairs() -> list[Choice]:
    """Choose rows greedily until every pair of values of two factors stands in one. Deterministic."""
    names = list(FACTORS)
    open_pairs = {(a, i, b, j) for a, b in itertools.combinations(names, 2)
                  for i in range(len(FACTORS[a])) for j in range(len(FACTORS[b]))
                  if not idle({a: FACTORS[a][i], b: FACTORS[b][j]})}
    rng = np.random.default_rng(0)
    rows: list[Choice] = []
    while open_pairs:
        best: dict[str, int] = {}
        best_gain = -1
        for _ in range(60):
            row = {name: int(rng.integers(len(FACTORS[name]))) for name in names}
            a, i, b, j = min(open_pairs) if best_gain < 0 else row_pair(rng, open_pairs)
            row[a], row[b] = i, j
            if idle({name: FACTORS[name][index] for name, index in row.items()}):
                continue
            gain = sum((x, row[x], y, row[y]) in open_pairs for x, y in itertools.combinations(names, 2))
            if gain > best_gain:
                best, best_gain = row, gain
        open_pairs -= {(x, best[x], y, best[y]) for x, y in itertools.combinations(names, 2)}
        rows.append({name: FACTORS[name][index] for name, index in best.items()})
    return rows


def idle(choice: Choice) -> bool:
    """Whether one replica is to shard gradients or weights, the same as ZeRO 1, or no exchange can be cut."""
    tp, _, dp = choice.get("mesh", (2, 1, 2))
    one_piece = tp in (1, 8) or not choice.get("sequence_parallel", True)
    return (dp == 1 and choice.get("zero", 1) > 1) or (one_piece and choice.get("tp_overlap", 1) > 1)


def row_pair(rng: np.random.Generator, pairs: set[tuple[str, int, str, int]]) -> tuple[str, int, str, int]:
    """Pick one of the open pairs."""
    return sorted(pairs)[int(rng.integers(len(pairs)))]


def full_product(max_ranks: int) -> Iterator[Choice]:
    """Yield every combination that fits, with all schedules."""
    factors = {**FACTORS, "schedule": SCHEDULES}
    for values in itertools.product(*factors.values()):
        choice = dict(zip(factors, values, strict=True))
        if int(np.prod(choice["mesh"])) <= max_ranks:
            yield choice


def job_of(choice: Choice, precision: str = "fp64") -> Job:
    """Make a small job of a choice; the learning rate is high, so that an error in one step shows in the next."""
    tp, pp, dp = choice["mesh"]
    chunks = CHUNKS.get(choice["schedule"], 1)
    batch = dp * choice["accumulation"] * {"interleaved": pp, "dualpipev": 2 * pp}.get(choice["schedule"], 1)
    return resolve(override(
        Job(),
        model={"kind": choice["kind"], "layers": max(2, pp * chunks) + choice["spare_layers"], "hidden": 32, "heads": 8,
               "ffn": 48, "seq": 8, "kv_heads": choice["kv_heads"], "vocab": choice["vocab"], "tied": choice["tied"],
               "dropout": choice["dropout"], "init_std": 0.1,
               **{name: choice[name] for name in STABILISERS if name in choice}},
        layout={"tp": tp, "pp": pp, "dp": dp, "schedule": choice["schedule"], "chunks": chunks, "zero": choice["zero"],
                "sequence_parallel": choice["sequence_parallel"], "tp_overlap": choice.get("tp_overlap", 1),
                "recompute": choice["recompute"],
                "bucket_mib": 0.02},
        train={"global_batch": 2 * batch if choice["ramp"] else batch, "microbatch": 1, "precision": precision,
               "steps": 20},
        optim={"lr": 0.01, "clip": choice["clip"], "warmup_steps": 3,
               "ramp": (batch, batch, 4 * batch) if choice["ramp"] else None},
    ))


def name_of(choice: Choice) -> str:
    """Name a choice for the report."""
    tp, pp, dp = choice["mesh"]
    return f"tp{tp}-pp{pp}-dp{dp}-" + "-".join(str(v) for k, v in choice.items() if k != "mesh")


def random_tokens(vocab: int, seq: int) -> Any:
    """Return a function from sample numbers to tokens [n, seq + 1], without a store."""
    return lambda numbers: np.stack([np.random.default_rng([7, int(n)]).integers(0, vocab, seq + 1) for n in numbers])


def legal(choice: Choice) -> bool:
    """Whether a choice resolves to a job."""
    try:
        job_of(choice)
    except UserError:
        return False
    return True
