"""Model and layout chosen together, the published ladders, and sums on the back of an envelope."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hpcpar.config.job import Job, Model
from hpcpar.config.load import override
from hpcpar.config.resolve import resolve
from hpcpar.errors import UserError, did_you_mean
from hpcpar.planner import flops
from hpcpar.planner.hardware import load_machine
from hpcpar.planner.params import total_parameters
from hpcpar.planner.plan import Plan
from hpcpar.planner.search import search
from hpcpar.units import format_bytes, format_count, format_seconds

# layers, hidden, heads. Source: Brown et al. 2020, arXiv 2005.14165, table 2.1; the paper prints 24 heads for 1.3B and
# hidden 5140 for 13B, neither of which divides; these are the nearest that do
LADDERS = {"gpt3": {
    "125M": (12, 768, 12), "350M": (24, 1024, 16), "760M": (24, 1536, 16), "1.3B": (24, 2048, 16),
    "2.7B": (32, 2560, 32), "6.7B": (32, 4096, 32), "13B": (40, 5120, 40), "175B": (96, 12288, 96)}}
GPT3_TOKENS, GPT3_SEQ, GPT3_VOCAB = 300e9, 2048, 50257
HEAD_DIM = 128
TOKENS_PER_PARAM = 20  # compute-optimal. Source: Hoffmann et al. 2022, arXiv 2203.15556
USUAL_ASPECT = 150  # hidden / layers: GPT-3 128, MT-NLG 195, Yuan 216
PRECISIONS = {"fp32": 4, "bf16 or fp16": 2, "fp8": 1, "mixed training (16 bytes, Adam)": 16,
              "with fp32 gradients (18)": 18}


def ladder_models(name: str) -> dict[str, Model]:
    """Return a published ladder's models. Raises UserError for an unknown name."""
    if name not in LADDERS:
        raise UserError("--ladder", f"{name} is not known", did_you_mean(name, LADDERS))
    return {size: Model(layers=layers, hidden=hidden, heads=heads, kv_heads=heads, ffn=4 * hidden, seq=GPT3_SEQ,
                        vocab=GPT3_VOCAB) for size, (layers, hidden, heads) in LADDERS[name].items()}


def describe_ladder(name: str, gpu: str) -> str:
    """Tell parameters, memory of the states, and PF-days for 300B tokens, size by size."""
    peak = load_machine(gpu).peak_16_bits / 1e12
    lines = [f"{name}: sequence {GPT3_SEQ}, vocabulary {GPT3_VOCAB:,}, 300B tokens",
             "size    layers hidden heads      parameters   18 bytes each   6PT PF-days   GPU-days at 40% of "
             f"{peak:g} TFLOP/s"]
    for size, model in ladder_models(name).items():
        count = total_parameters(model)
        work = flops.train_flops(count, GPT3_TOKENS)
        lines.append(f"{size:<7}{model.layers:>7}{model.hidden:>7}{model.heads:>6}{count:>16,}"
                     f"{format_bytes(18 * count):>16}{flops.pf_days(work):>14,.1f}"
                     f"{flops.train_days(work, 1, 0.4 * peak * 1e12):>14,.0f}")
    return "\n".join(lines)


def describe_sums(params: float, tokens: float | None, num_gpus: int | None, gpu: str, efficiency: float | None,
                  price: float) -> str:
    """Turn parameters into bytes, and tokens into FLOPs, GPU-days and money."""
    lines = [f"{format_count(params)} parameters"]
    lines += [f"  {name:<34}{params * size / 1e9:>12,.1f} GB{params * size / 2**30:>12,.1f} GiB"
              for name, size in PRECISIONS.items()]
    if tokens is None:
        return "\n".join(lines)
    model, hardware = flops.train_flops(params, tokens), flops.train_flops(params, tokens, recompute=True)
    lines += [f"{format_count(tokens)} tokens", f"  6PT {model:.3e} FLOP = {flops.pf_days(model):,.1f} PF-days (model)",
              f"  8PT {hardware:.3e} FLOP = {flops.pf_days(hardware):,.1f} PF-days (recomputed forward counted)"]
    peak = load_machine(gpu).peak_16_bits
    share = efficiency or 0.4
    for name, work in (("6PT", model), ("8PT", hardware)):
        gpu_days = flops.train_days(work, 1, share * peak)
        text = f"  {name} at {share:.1%} of {peak / 1e12:g} TFLOP/s: {gpu_days:,.0f} GPU-days"
        text += f", {gpu_days / num_gpus:,.1f} days on {num_gpus} {gpu}" if num_gpus else ""
        lines.append(text + (f", {gpu_days * 24 * price:,.0f} at {price:g} a GPU-hour" if price else ""))
    return "\n".join(lines)


@dataclass(frozen=True)
class Shape:
    """A model's shape with its best layout."""

    model: Model
    params: int
    plan: Plan


def shapes_of(params: float, base: Model, tolerance: float = 0.04) -> list[Model]:
    """List models of about `params` parameters, from wide to deep; heads of 128 channels."""
    found = []
    for layers in (12, 16, 20, 24, 32, 40, 48, 56, 64, 72, 76, 80, 88, 96, 104, 112, 120, 128, 144, 160, 192):
        about = (params / (12 * layers)) ** 0.5
        step = HEAD_DIM * (1 if about < 6144 else 4 if about < 12288 else 8)  # powers of two suit tiles and tp
        for hidden in range(max(step, int(0.8 * about) // step * step), int(1.1 * about) + step, step):
            heads = hidden // HEAD_DIM
            ffn = 4 * hidden if base.kind == "gpt" else -(-8 * hidden // (3 * step)) * step
            kv_heads = min(heads, base.kv_heads or heads)
            model = Model(kind=base.kind, layers=layers, hidden=hidden, heads=heads, ffn=ffn, seq=base.seq,
                          kv_heads=kv_heads if heads % kv_heads == 0 else heads, vocab=base.vocab, tied=base.tied)
            if 20 <= hidden / layers <= 400 and abs(total_parameters(model) / params - 1) < tolerance:
                found.append(model)
    return found


def frontier(job: Job, num_gpus: int, params: float, top: int = 8, tried: int = 24) -> list[Shape]:
    """Return shapes for a parameter budget with the best layout of each, fastest a parameter first.

    `tried` shapes at most, those whose hidden / layers is nearest to what is usual. Cost: a tenth of a second each.
    """
    found = []
    models = sorted(shapes_of(params, job.model), key=lambda m: abs(math.log(m.hidden / m.layers / USUAL_ASPECT)))
    for model in models[:tried]:
        try:
            best = search(override_model(job, model), num_gpus, top=1, finalists=3).best
        except UserError:
            continue
        found.append(Shape(model, total_parameters(model), best[0]))
    if not found:
        raise UserError("--budget", f"no shape of {format_count(params)} parameters fits {num_gpus} GPUs",
                        "take fewer parameters or more GPUs")
    return sorted(found, key=lambda s: s.plan.time.total / s.params)[:top]


def override_model(job: Job, model: Model) -> Job:
    """Return a resolved job with another model, on a layout that any model allows."""
    changed = override(job, layout={"tp": 1, "pp": 1, "cp": 1, "dp": 1, "chunks": 1, "schedule": "1f1b"},
                       train={"microbatch": 1})
    kept = {f: getattr(model, f) for f in ("layers", "hidden", "heads", "kv_heads", "ffn")}
    return resolve(override(changed, model=kept), on_paper=True)


def describe_frontier(shapes: list[Shape], params: float) -> str:
    """Tell the shapes for a budget as a table."""
    first = shapes[0].plan
    lines = [f"shapes of about {format_count(params)} parameters on {first.job.world_size} {first.machine.name}, "
             "fastest a parameter first:", "",
             "layers hidden heads  parameters   tp  pp  dp schedule      mb recompute      step    MFU  days for 1T "
             "tokens"]
    for shape in shapes:
        m, job = shape.model, shape.plan.job
        days = 1e12 / (job.train.global_batch * m.seq) * shape.plan.time.total / 86400
        lines.append(f"{m.layers:>6}{m.hidden:>7}{m.heads:>6}{format_count(shape.params):>12}{job.layout.tp:>5}"
                     f"{job.layout.pp:>4}{job.layout.dp or 1:>4} {job.layout.schedule:<13}{job.train.microbatch:>3} "
                     f"{job.layout.recompute:<10}{format_seconds(shape.plan.time.total):>9}{shape.plan.mfu:>7.1%}"
                     f"{days:>12.1f}")
    return "\n".join(lines)


def largest_in(job: Job, num_gpus: int, days: float, tokens_per_param: float = TOKENS_PER_PARAM) -> Shape:
    """Return the largest model that `num_gpus` train in `days` with a number of tokens for each parameter."""
    best: Shape | None = None
    low, high = 1e8, 4e12
    while high / low > 1.1:
        params = (low * high) ** 0.5
        try:
            shape = frontier(job, num_gpus, params, top=1, tried=2)[0]
        except UserError:
            high = params
            continue
        job_step = shape.plan.job.train.global_batch * shape.model.seq
        needed = shape.params * tokens_per_param / job_step * shape.plan.time.total / 86400
        if needed <= days:
            best, low = shape, params
        else:
            high = params
    if best is None:
        raise UserError("--budget", f"{days:g} days are too short on {num_gpus} GPUs", "give more days or GPUs")
    return best
