"""Measurements that others published, as jobs that the planner can price, and how their software worked.

published.csv: one row a run with its full configuration (papers, vendors' recipes, public logbooks; column `source`).
published_layers.csv: the time of one layer. What a row does not say (flash attention, fused kernels, how gradients are
reduced) is a fact about the software that produced it: a `Practice`, one for each source, yes and no answers from its
paper or code, nothing fitted.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from hpcpar.config.job import Job, LayoutWish, Model, Train
from hpcpar.planner.compute import Cut
from hpcpar.planner.hardware import Machine, load_machine
from hpcpar.planner.practice import Practice

HERE = Path(__file__).parent
GPUS = {
    "A100-SXM-80GB": "a100-80g", "A100-SXM-40GB": "a100-40g", "H100-SXM-80GB": "h100-80g", "GB200-186GB": "gb200",
    "H100-SXM-96GB-HBM2e-500W": str(HERE / "machines/h100-96g-500w.toml"),
}
JEAN_ZAY = str(HERE / "machines/jean-zay.toml")

# Megatron-LM of 2021: fused elementwise kernels, attention through memory, nothing overlapped, gradients in fp16
MEGATRON_2021 = Practice(
    flash=0, fused=True, packed_projections=True, dropout=True, keeps_gathered=False, stops_early=False,
    recomputes_projections=False, grad_bytes=2, accumulate_bytes=6, overlaps_reduction=False, scatters_activations=True,
    scatters_gradients=True, blocking_messages=2, adam_traffic=40)
# Megatron-LM of 2022: gradients in fp32, accumulated by the product itself
MEGATRON_2022 = dataclasses.replace(MEGATRON_2021, grad_bytes=4, accumulate_bytes=0)
# Megatron-DeepSpeed: the same layers; messages one after the other, those of gradients whole (its pipeline engine of
# 2021: is_grad_partitioned = False), ZeRO-1 with whole all-reduces and its buckets
DEEPSPEED = dataclasses.replace(
    MEGATRON_2021, blocking_messages=4, scatters_gradients=False, reduces_whole=True, copies_owned_grads=True,
    bucket_bytes=2e9)
# its optimizer for bf16 (bf16_optimizer.py of 2022, update_hp_grads): a gradient is copied into fp32 (2 + 4 bytes),
# then added to the accumulated one (4 + 4 + 4)
DEEPSPEED_BF16 = MappingProxyType({
    "grad_bytes": 4, "accumulate_bytes": 18, "keeps_both_grads": True, "copies_owned_grads": False})
BLOOM = dataclasses.replace(DEEPSPEED, ceil_split=True, blocking_launches=True)
# llm-foundry: PyTorch FSDP, the first flash attention (Triton), packed q k v, a fused cross-entropy, non-reentrant
# checkpointing
FOUNDRY = Practice(
    flash=1, packed_projections=True, grad_bytes=2, accumulate_bytes=6, logits_bytes=4, adam_traffic=40)
# torchtitan: FSDP2 with fp32 reduction, plain norms unless compiled, selective recomputation of every other product
TITAN = Practice(accumulate_bytes=8, plain_norms=True, keeps_half_the_products=True, reorders_gathered=True)
# NVIDIA NeMo and Megatron-Core of 2024: everything fused, flash attention, overlapped gradients
NEMO = Practice(fused=True, packed_projections=True, keeps_gathered=False, accumulate_bytes=0, overlaps_tensor=True,
                stops_early=False, recomputes_projections=False)

PRACTICES = {
    "megatron21": MEGATRON_2021, "megatron21-fig": MEGATRON_2021, "korthikanti22": MEGATRON_2022,
    "mtnlg22": DEEPSPEED, "bigscience-tr11": BLOOM,
    "llm-foundry": FOUNDRY, "torchtitan": TITAN,
}


@dataclass(frozen=True)
class Row:
    """One published run."""

    name: str
    source_id: str
    quality: str
    oom: bool
    recompute_stated: bool
    precision: str
    job: Job
    machine: Machine
    practice: Practice
    step_s: float | None
    memory_gib: float | None
    source: str

    @property
    def gated(self) -> bool:
        """Whether its error counts: quality A or B, 16 bits, recomputation stated."""
        return self.quality in "AB" and self.recompute_stated and self.precision in ("bf16", "fp16", "bf16-pure")


def rows() -> Iterator[Row]:
    """Yield the rows in 16 bits; the planner does not price FP8."""
    with (HERE / "published.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["precision"] in ("bf16", "fp16", "bf16-pure"):
                yield _row(line)


def _row(line: dict[str, str]) -> Row:
    heads, chunks = int(line["heads"]), int(line["chunks"])
    gated = line["gated"] == "yes"
    job = Job(
        model=Model(kind="llama" if gated else "gpt", layers=int(line["layers"]), hidden=int(line["hidden"]),
                    heads=heads, kv_heads=int(line["kv_heads"] or heads), ffn=int(line["ffn"]), seq=int(line["seq"]),
                    vocab=int(line["vocab"]), tied=not gated),
        layout=LayoutWish(tp=int(line["tp"]), pp=int(line["pp"]), dp=int(line["dp"]), cp=int(line["cp"]),
                          chunks=chunks, schedule="interleaved" if chunks > 1 else "1f1b",
                          zero=int(line["zero"]), sequence_parallel=line["sequence_parallel"] == "yes",
                          recompute=line["recompute"] or "none"),
        train=Train(global_batch=int(line["global_batch"]), microbatch=int(line["microbatch"]),
                    precision="fp16" if line["precision"] == "fp16" else "bf16"))
    practice = PRACTICES.get(line["source_id"], NEMO)
    if line["source_id"] in ("mtnlg22", "bigscience-tr11") and line["precision"] == "bf16":
        practice = dataclasses.replace(practice, **DEEPSPEED_BF16)
    if "compile" in line["config_id"]:
        practice = dataclasses.replace(practice, fused=True, plain_norms=False)
    if line["config_id"].endswith("async"):
        practice = dataclasses.replace(practice, overlaps_tensor=True)
    return Row(line["config_id"], line["source_id"], line["quality"], line["row_kind"] == "oom",
               bool(line["recompute"]), line["precision"], job, machine_of(line["gpu"], line["source_id"]), practice,
               float(line["step_s"]) if line["step_s"] else None, float(line["mem_gb"]) if line["mem_gb"] else None,
               line["source"])


def machine_of(gpu: str, source_id: str) -> Machine:
    """Return the machine that a row ran on."""
    return load_machine(JEAN_ZAY if source_id == "bigscience-tr11" else GPUS[gpu])


@dataclass(frozen=True)
class LayerRow:
    """One published layer time, in milliseconds."""

    name: str
    cut: Cut
    recompute: str
    forward_ms: float
    backward_ms: float


def layer_rows() -> Iterator[LayerRow]:
    """Yield the layer times (A100 80GB, Megatron-LM of 2022)."""
    with (HERE / "published_layers.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            heads, hidden = int(line["heads"]), int(line["hidden"])
            model = Model(layers=int(line["layers"]), hidden=hidden, heads=heads, kv_heads=heads, ffn=4 * hidden,
                          seq=int(line["seq_len"]))
            cut = Cut(model, int(line["micro_batch"]), int(line["tp"]), 1, line["seq_parallel"] == "yes", "fp16")
            yield LayerRow(line["fact_id"], cut, line["recompute"], float(line["forward_ms"]),
                           float(line["backward_ms"]))
