"""A small store and job for tests of whole runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hpcpar.config.job import Job
from hpcpar.config.load import job_from_tables
from hpcpar.data.build import build

VOCAB = 300


def make_store(folder: Path) -> Path:
    """Build a token store from a little made-up text."""
    rng = np.random.default_rng(3)
    words = ["rank", "stage", "tensor", "shard", "bucket", "layer", "step", "loss"]
    text = "\n".join(" ".join(rng.choice(words, 12)) for _ in range(400))
    (folder / "text.txt").write_text(text)
    build([folder / "text.txt"], folder / "store", vocab=VOCAB, workers=1, progress=False)
    return folder / "store"


def make_job(store: Path, **tables: dict[str, object]) -> Job:
    """Make a job of a small GPT in fp64; `tables` replace options."""
    base: dict[str, dict[str, object]] = {
        "model": {"layers": 4, "hidden": 32, "heads": 4, "seq": 16, "vocab": VOCAB, "dropout": 0.1},
        "train": {"global_batch": 8, "steps": 6, "precision": "fp64"},
        "optim": {"lr": 0.01, "warmup_steps": 2, "decay_steps": 6, "clip": 0.5},
        "data": {"store": str(store), "validation": 0.1, "validate_every": 3, "validate_samples": 5},
        "checkpoint": {"every": 0},
    }
    return job_from_tables({name: {**base.get(name, {}), **tables.get(name, {})} for name in base | tables})
