from __future__ import annotations

from hpcpar.config.load import job_from_tables
from hpcpar.config.resolve import resolve
from hpcpar.layout.describe import describe
from hpcpar.layout.layout import Layout


def test_a_small_layout_in_words() -> None:
    job = resolve(job_from_tables({
        "model": {"layers": 3, "hidden": 48, "heads": 6, "seq": 8, "vocab": 64},
        "layout": {"tp": 2, "pp": 2, "dp": 2}, "train": {"global_batch": 8, "microbatch": 2, "precision": "fp32"},
    }))
    layout = Layout(job)
    lines = describe(layout).splitlines()
    total = sum(p.numel for p in layout.table)
    assert lines[0].split()[:2] == ["parameters", f"{total:,}"]
    assert "8 = pp 2 x dp 2 x tp 2" in lines[1]
    assert "8 sequences = 2 replicas x 2 microbatches x 2" in lines[2]
    stages = [line for line in lines if line.startswith("stage ")]
    assert len(stages) == 2
    assert "ranks 0-3" in stages[0] and "layers 0-1" in stages[0] and stages[0].endswith("+ embedding")
    assert "ranks 4-7" in stages[1] and "layers 2-2" in stages[1] and stages[1].endswith("+ logits")
    ranks = [line for line in lines if line.startswith("rank ")]
    assert len(ranks) == 8
    assert "q rows 24-47" in ranks[1] and "ffn rows 96-191" in ranks[1]
