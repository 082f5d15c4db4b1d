"""One GPU: hpcpar beside plain loops on the same model, tokens and precision, as shares of the measured matrix rate.

    python benchmarks/one_gpu.py [--only gpt-1.3b@2048] [--sides hpcpar,pytorch] [--json FILE] [--profile]
    python benchmarks/one_gpu.py --foretold machine.toml    # ten jobs, what `hpcpar calibrate machine.toml` foretells

All sides compute in bf16 with fp32 master weights, moments and gradients, fused AdamW and clipping, on the same random
tokens; a step accumulates two microbatches. They take turns within a repetition. A share is of model FLOPs (attention
counted in full) over the best bf16 product of this run, and over the datasheet's dense peak. Peers: one_gpu_peers.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from one_gpu_peers import PEERS

from hpcpar.comm.bootstrap import connect
from hpcpar.comm.groups import open_groups
from hpcpar.config.job import Job
from hpcpar.config.load import override
from hpcpar.config.resolve import resolve
from hpcpar.config.surroundings import Surroundings
from hpcpar.layout.layout import Layout
from hpcpar.parallel.build import build, initialise
from hpcpar.planner.flops import model_flops
from hpcpar.planner.hardware import load_machine
from hpcpar.planner.plan import make_plan
from hpcpar.train.state import Progress
from hpcpar.train.step import Trainee, train_step

GPT = {"kind": "gpt", "layers": 24, "hidden": 2048, "heads": 16, "seq": 2048, "vocab": 50304, "tied": True}
LLAMA = {"kind": "llama", "layers": 16, "hidden": 4096, "heads": 32, "ffn": 11008, "seq": 2048, "vocab": 32000,
         "tied": False}  # Llama 7B's layers, half of them: with all 32 the fp32 state alone takes 121 GB
CASES: dict[str, tuple[dict[str, Any], int]] = {  # model, microbatch
    "gpt-1.3b@2048": (GPT, 8),
    "gpt-1.3b@8192": ({**GPT, "seq": 8192}, 2),
    "llama-7b-16-layers@2048": (LLAMA, 4),
    "llama-7b-16-layers@8192": ({**LLAMA, "seq": 8192}, 1),
}
ACCUMULATED = 2
WARM, TIMED = 2, 3  # steps of a turn
FORETOLD: dict[str, tuple[dict[str, Any], int, str]] = {  # model, microbatch, recompute
    "gpt 1.3B": (GPT, 4, "none"),
    "gpt 1.3B, microbatch 8": (GPT, 8, "none"),
    "gpt 1.3B, selective": (GPT, 8, "selective"),
    "gpt 1.3B, full": (GPT, 16, "full"),
    "gpt 1.3B, seq 8192": ({**GPT, "seq": 8192}, 2, "none"),
    "gpt 350M": ({**GPT, "hidden": 1024}, 16, "none"),
    "gpt 2.7B": ({**GPT, "layers": 32, "hidden": 2560, "heads": 32}, 4, "none"),
    "llama 7B, 8 layers": ({**LLAMA, "layers": 8}, 4, "none"),
    "llama 7B, 8 layers, seq 4096, full": ({**LLAMA, "layers": 8, "seq": 4096}, 4, "full"),
    "llama 8B (grouped queries), 4 layers, seq 8192": (
        {**LLAMA, "layers": 4, "kv_heads": 8, "ffn": 14336, "vocab": 128256, "seq": 8192}, 1, "none"),
}
Step = Callable[[torch.Tensor], float]  # rows [batch, seq + 1] int64 on the CPU -> loss


def job_of(model: dict[str, Any], microbatch: int, recompute: str = "none", **train: Any) -> Job:
    """Make the resolved job of one GPU."""
    wish = {"global_batch": microbatch * ACCUMULATED, "microbatch": microbatch, "precision": "bf16", "steps": 1000}
    return resolve(override(Job(), model=model, train={**wish, **train}, layout={"recompute": recompute},
                            optim={"warmup_steps": 10}), 1)


def hpcpar_step(job: Job) -> Step:
    """Build hpcpar's step."""
    layout, device = Layout(job), connect(Surroundings.read({})).device
    groups = open_groups(layout.mesh, 0)
    pipeline, optimizer = build(layout, groups, device)
    initialise(optimizer, job.train.seed)
    trainee, progress = Trainee(layout, groups, pipeline, optimizer, device), Progress()

    def step(rows: torch.Tensor) -> float:
        def tokens(numbers: np.ndarray) -> np.ndarray:
            start = int(numbers[0]) - progress.samples
            return rows[start:start + len(numbers)].numpy()

        return train_step(trainee, progress, tokens).loss

    return step


def sides() -> dict[str, Callable[[dict[str, Any], int], Step]]:
    """Return what builds each side's step."""
    return {
        "hpcpar": lambda model, microbatch: hpcpar_step(job_of(model, microbatch)),
        "hpcpar eager": lambda model, microbatch: hpcpar_step(job_of(model, microbatch, compile=False)),
        **{name: lambda model, microbatch, make=make: make(model, microbatch) for name, make in PEERS.items()},
    }


def random_rows(model: dict[str, Any], batch: int) -> torch.Tensor:
    """Draw tokens [batch, seq + 1]."""
    return torch.randint(model["vocab"], (batch, model["seq"] + 1), generator=torch.Generator().manual_seed(1))


def timed(step: Step, rows: torch.Tensor, num: int) -> list[float]:
    """Return the seconds of each of `num` steps."""
    found = []
    for _ in range(num):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(rows)
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return found


def product_rate() -> float:
    """Return the FLOP/s of the best of a few large bf16 products of random numbers, each run for half a second."""
    best = 0.0
    for m, n, k in ((8192, 8192, 8192), (16384, 8192, 2048), (16384, 2048, 8192), (8192, 11008, 4096)):
        a, b = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, k), (n, k)))
        rounds = int(0.5 * 7e14 / (2 * m * n * k))
        for _ in range(3):
            a @ b.t()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(rounds):
            a @ b.t()
        torch.cuda.synchronize()
        best = max(best, 2 * m * n * k * rounds / (time.perf_counter() - start))
    return best


def clean() -> None:
    """Give a side's memory back before the next one is built."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every side of every case; sides of a case are built one after the other, twice if `--repeat 2`."""
    rate, datasheet = product_rate(), load_machine("h200").peak_flops("bf16")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: best bf16 product {rate / 1e12:.0f} TFLOP/s; "
          f"datasheet {datasheet / 1e12:.0f}\n| case | side | ms a step | tokens/s | of the measured product rate | "
          "of the datasheet | peak GiB | loss |\n|---|---|---|---|---|---|---|---|", flush=True)
    found = []
    for case, (model, microbatch) in CASES.items():
        if args.only and case not in args.only.split(","):
            continue
        batch = microbatch * ACCUMULATED
        flops = model_flops(job_of(model, microbatch).model, batch)
        rows = random_rows(model, batch)
        for name, make in list(sides().items()) * args.repeat:
            if args.sides and name not in args.sides.split(","):
                continue
            clean()
            began = time.perf_counter()
            try:
                step = make(model, microbatch)
                losses = [step(rows) for _ in range(WARM)]
                warm_s = time.perf_counter() - began
                seconds = median(timed(step, rows, TIMED))
            except Exception as error:  # a peer that cannot is a row too
                print(f"| {case} | {name} | {type(error).__name__}: {str(error)[:300]} |", flush=True)
                continue
            row = {"case": case, "side": name, "ms": 1e3 * seconds, "tokens_per_s": batch * model["seq"] / seconds,
                   "of_measured": flops / seconds / rate, "of_datasheet": flops / seconds / datasheet,
                   "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "loss": losses[0], "warm_up_s": warm_s}
            found.append(row)
            print(f"| {case} | {name} | {row['ms']:.1f} | {row['tokens_per_s']:.0f} | {row['of_measured']:.3f} | "
                  f"{row['of_datasheet']:.3f} | {row['peak_gib']:.1f} | {losses[0]:.3f} | warm-up {warm_s:.0f} s",
                  flush=True)
            if args.profile and name.startswith("hpcpar"):
                profile(step, rows)
            del step
    return found


def profile(step: Step, rows: torch.Tensor) -> None:
    """Print the ten kernels that took most of a step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watching

    with watching(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as watched:
        step(rows)
        torch.cuda.synchronize()
    kernels = sorted((e for e in watched.key_averages() if str(e.device_type).endswith("CUDA")),
                     key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels)
    for e in kernels[:14]:
        print(f"    {e.self_device_time_total / total:6.1%} {e.self_device_time_total / 1e3:8.2f} ms "
              f"{e.count:5d} x {e.key[:110]}")
    print(f"    all kernels {total / 1e3:.1f} ms", flush=True)


def foretell(machine: str) -> list[dict[str, Any]]:
    """Hold the planner against ten jobs on this GPU."""
    print("| job | step ms | foretold | error | peak GiB | foretold | error |\n|---|---|---|---|---|---|---|")
    found = []
    for name, (model, microbatch, recompute) in FORETOLD.items():
        clean()
        job = job_of(model, microbatch, recompute)
        plan = make_plan(override(job, machine={"gpu": machine, "gpus_per_node": 1}))
        memory = plan.memory[0]
        foretold_s, foretold_bytes = plan.time.total, memory.total - memory.fragmentation
        step, rows = hpcpar_step(job), random_rows(model, job.train.global_batch)
        timed(step, rows, WARM)
        torch.cuda.reset_peak_memory_stats()
        seconds, peak = median(timed(step, rows, TIMED)), torch.cuda.max_memory_allocated()
        found.append({"job": name, "seconds": seconds, "foretold_s": foretold_s, "bytes": peak,
                      "foretold_bytes": foretold_bytes, "reserved_bytes": torch.cuda.max_memory_reserved(),
                      "parts": {key: getattr(memory, key) for key in memory.__dataclass_fields__}})
        print(f"| {name} | {1e3 * seconds:.1f} | {1e3 * foretold_s:.1f} | {foretold_s / seconds - 1:+.1%} | "
              f"{peak / 2**30:.2f} | {foretold_bytes / 2**30:.2f} | {foretold_bytes / peak - 1:+.1%} |", flush=True)
        del step
    return found


def main() -> None:
    """Read the words and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases, by comma")
    parser.add_argument("--sides", help="sides, by comma")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--foretold", metavar="MACHINE.toml")
    args = parser.parse_args()
    found = foretell(args.foretold) if args.foretold else compare(args)
    if args.json:
        args.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                                         "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
