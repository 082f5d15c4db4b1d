"""The best layouts of a model on a number of GPUs: every family is priced or refused with its reason."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hpcpar.config.job import Job, required
from hpcpar.config.load import override
from hpcpar.config.resolve import resolve
from hpcpar.errors import UserError
from hpcpar.planner.hardware import Machine, load_machine
from hpcpar.planner.plan import Plan, make_plan
from hpcpar.planner.practice import Practice
from hpcpar.planner.step import Pricing
from hpcpar.units import format_bytes, format_seconds

MICROBATCHES = (1, 2, 4, 8, 16)
FINALISTS = 24  # candidates whose schedule is played after a quick pricing
SPARE = 0.05  # of the memory, which a search leaves free: what is foretold errs by as much
LONG_SEQUENCE = 16384  # from here on context parallelism is tried


@dataclass
class Found:
    """What a search found: plans, best first, and what was refused and why."""

    best: list[Plan] = field(default_factory=list)
    num_priced: int = 0
    refused: Counter[str] = field(default_factory=Counter)


def divisors(number: int) -> list[int]:
    """List the divisors in order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def search(job: Job, num_gpus: int, machine: Machine | None = None, practice: Practice | None = None,
           top: int = 10, finalists: int = FINALISTS) -> Found:
    """Price all layouts of a resolved job's model and batch on `num_gpus`; Raises UserError where nothing fits.

    Cost: about a second for thousands of candidates.
    """
    chosen = machine or load_machine(job.machine.gpu)
    found = Found()
    priced: list[tuple[float, Job]] = []
    for candidate in _candidates(job, num_gpus, chosen, found.refused):
        pricing = Pricing(candidate, chosen, practice)
        if pricing.least_memory_bytes() > (1 - SPARE) * pricing.machine.chip.usable_bytes:
            wish = candidate.layout
            found.refused[f"recompute {wish.recompute}, ZeRO-{wish.zero_stage}: does not fit with "
                          f"{SPARE:.0%} to spare"] += 1
            continue
        found.num_priced += 1
        priced.append((pricing.step(quick=True).total, candidate))
    if not priced:
        raise UserError("layout", f"no layout of this model fits {num_gpus} {chosen.name}", _nearest_miss(found))
    priced.sort(key=lambda pair: pair[0])
    plans = [make_plan(candidate, chosen, practice, exact=False) for _, candidate in priced[:finalists]]
    found.best = sorted((p for p in plans if p.fits), key=lambda p: p.time.total)[:top]
    return found


def _nearest_miss(found: Found) -> str:
    fix = "take more GPUs, or ones with more memory" if any("does not fit" in why for why in found.refused) else \
        "take another number of GPUs, or another train.global_batch"
    return "refused: " + "; ".join(f"{why} ({count})" for why, count in found.refused.most_common(3)) + f"; {fix}"


def _candidates(job: Job, num_gpus: int, machine: Machine, refused: Counter[str]) -> Iterator[Job]:
    """Yield resolved jobs; what breaks a rule is counted under its reason."""
    model, batch = job.model, job.train.global_batch
    kv_heads, ffn = required(model.kv_heads), required(model.ffn)
    refused["ep > 1: the model has no experts"] += 1
    context = [cp for cp in divisors(num_gpus) if cp <= 64 and model.seq % cp == 0] \
        if model.seq >= LONG_SEQUENCE else [1]
    if model.seq < LONG_SEQUENCE:
        refused[f"cp > 1: a sequence of {model.seq} fits one rank, cutting it only adds exchanges"] += 1
    for tp in divisors(num_gpus):
        if model.heads % tp or ffn % tp or (kv_heads % tp and tp % kv_heads):
            refused[f"tp {tp} does not divide heads {model.heads} and ffn {ffn}"] += tp <= 64
            continue
        if tp > machine.inside.devices:
            refused[f"tp > {machine.inside.devices} would cross nodes: {machine.inside.gb_per_s:g} GB/s a device "
                    f"inside, {machine.across.gb_per_s:g} across"] += 1
            continue
        for cp in context:
            for pp in divisors(num_gpus // tp // cp) if num_gpus % (tp * cp) == 0 else []:
                if pp > model.layers:
                    refused[f"pp > {model.layers}: every stage needs a layer"] += 1
                    continue
                dp = num_gpus // (tp * cp * pp)
                if batch % dp:
                    refused[f"dp does not divide the batch of {batch}"] += 1
                    continue
                yield from _with_rest(job, tp, pp, cp, dp, refused)


def _with_rest(job: Job, tp: int, pp: int, cp: int, dp: int, refused: Counter[str]) -> Iterator[Job]:
    """Yield a mesh with every microbatch, schedule, ZeRO stage and recomputation."""
    model, batch = job.model, job.train.global_batch
    sequence_parallel = tp > 1 and model.seq % (tp * cp) == 0
    pieces = math.gcd(job.layout.tp_overlap, model.seq // (tp * cp)) if sequence_parallel else 1
    for microbatch in MICROBATCHES:
        if batch % (dp * microbatch):
            refused["dp x microbatch does not divide the batch"] += 1
            continue
        num = batch // (dp * microbatch)
        zeros = (0, 1) if dp * cp > 1 and pp > 1 else (1, 2, 3) if dp * cp > 1 else (0,)
        if dp * cp > 1 and pp > 1:
            refused["ZeRO-2 and 3 in a pipeline: gradients or weights would travel for every microbatch"] += 1
        for (schedule, chunks), zero, recompute in itertools.product(
                _schedules(model.layers, pp, num, refused), zeros, ("none", "selective", "full")):
            yield override(job, layout={
                "tp": tp, "pp": pp, "cp": cp, "dp": dp, "schedule": schedule, "chunks": chunks, "zero": zero,
                "recompute": recompute, "sequence_parallel": sequence_parallel, "tp_overlap": pieces},
                train={"microbatch": microbatch})


def _schedules(num_layers: int, pp: int, num_microbatches: int, refused: Counter[str]) -> list[tuple[str, int]]:
    if pp == 1:
        return [("1f1b", 1)]
    tried = [("1f1b", 1), ("zero-bubble", 1)]
    if 2 * pp <= num_layers:
        tried.append(("zbv", 2))
    if num_microbatches % pp:
        refused["interleaved: microbatches are no multiple of pp"] += 1
        return tried
    return tried + [("interleaved", v) for v in (2, 3, 4, 6, 8) if v * pp <= num_layers and num_layers % (v * pp) == 0]


def _changed(plan: Plan, accept: Callable[[Job], bool] = lambda job: True, **changes: dict[str, Any]) -> Plan | None:
    """Plan the changed job; None where the change breaks a rule, is not accepted, or does not fit."""
    try:
        job = resolve(override(plan.job, **changes), on_paper=True)
    except UserError:
        return None
    other = make_plan(job, plan.pricing.whole, exact=False) if accept(job) else None
    return other if other is not None and other.fits else None


def remedies(plan: Plan, most: int = 3, accept: Callable[[Job], bool] = lambda job: True) -> list[str]:
    """Name the single changes that need less memory and make a plan fit, cheapest in time first."""
    job, wish, micro = plan.job, plan.job.layout, plan.job.train.microbatch
    dp = required(wish.dp)
    changes: list[tuple[str, dict[str, Any], int]] = [
        (f"layout.recompute {mode}", {"recompute": mode}, micro) for mode in ("selective", "full", "offload")]
    stages = [stage for stage in (1, 2, 3) if stage > wish.zero_stage]
    changes += [(f"layout.zero {stage}", {"zero": stage}, micro) for stage in stages]
    inside = job.machine.gpus_per_node // wish.tp
    if 1 < inside < dp:  # hybrid: over the dp ranks of a node
        changes += [(f"layout.zero [{stage},{inside}]", {"zero": (stage, inside)}, micro) for stage in stages]
    changes += [(f"train.microbatch {micro // 2}", {}, micro // 2)] if micro > 1 else []
    for name in ("tp", "pp"):
        changes += [(f"layout.{name} {getattr(wish, name) * f} (layout.dp {dp // f})",
                     {name: getattr(wish, name) * f, "dp": dp // f}, micro) for f in (2, 4, 8) if dp % f == 0]
    found = []
    for text, layout, microbatch in changes:
        other = _changed(plan, accept, layout=layout, train={"microbatch": microbatch})
        if other is not None and other.time.total > 0:
            found.append((other.time.total, f"--{text}: {format_bytes(other.spare_bytes)} spare, a step of "
                          f"{format_seconds(other.time.total)}"))
    return [text for _, text in sorted(found)[:most]]


def faster_by_overlap(plan: Plan) -> str:
    """Name the number of pieces of exchanges over tp that makes a GPU job's step shorter, if any does by 1% or more."""
    wish, trials = plan.job.layout, []
    if not plan.machine.is_cpu and wish.tp_pieces == 1:
        for pieces in (2, 4):
            other = _changed(plan, layout={"tp_overlap": pieces})
            trials += [(other.time.total, pieces, other.spare_bytes)] if other is not None else []
    seconds, pieces, spare = min(trials, default=(plan.time.total, 1, 0.0))
    if seconds > 0.99 * plan.time.total:
        return ""
    kept = "q, k, v kept, " if wish.recompute == "selective" else ""
    return (f"--layout.tp_overlap {pieces}: in {pieces} pieces beside products, {kept}{format_bytes(spare)} spare, "
            f"a step of {format_seconds(seconds)}")


def trainable(job: Job) -> bool:
    """Whether hpcpar can train such a layout today, and not only plan it."""
    return job.layout.cp == 1 and job.layout.ep == 1


def layout_of(plan: Plan) -> dict[str, Any]:
    """Return the choices that make a candidate."""
    job = plan.job
    names = ("tp", "pp", "dp", "cp", "chunks", "schedule", "zero", "recompute", "sequence_parallel",
             "tp_overlap")
    return {name: getattr(job.layout, name) for name in names} | {"microbatch": job.train.microbatch}


def describe_search(found: Found) -> str:
    """Tell the best layouts as a table, why the second loses, and what was refused."""
    first = found.best[0]
    lines = [f"{found.num_priced:,} layouts priced, {sum(found.refused.values()):,} refused; the best of "
             f"{first.job.world_size} {first.machine.name}:", "",
             "     tp  pp  dp  cp schedule       chunks mb ZeRO recompute      step    MFU    HFU bubble     memory"]
    for number, plan in enumerate(found.best, 1):
        w = plan.job.layout
        lines.append(
            f"{number:>3} {w.tp:>4}{w.pp:>4}{required(w.dp):>4}{w.cp:>4} {w.schedule:<15}{w.chunks:>5}"
            f"{plan.job.train.microbatch:>4}{w.zero_stage:>4} {w.recompute:<10}{format_seconds(plan.time.total):>10}"
            f"{plan.mfu:>7.1%}{plan.hfu:>7.1%}{plan.time.bubble:>7.1%}"
            f"{format_bytes(plan.memory[plan.fullest].total):>11}"
            + (f"  in {w.tp_pieces} pieces over tp" if w.tp_pieces > 1 else "")
            + ("" if trainable(plan.job) else "  planned only"))
    if len(found.best) > 1:
        lines += ["", _why_second(first, found.best[1])]
    lines += ["", "refused:"]
    lines += [f"  {count:>6,} x {why}" for why, count in found.refused.most_common() if count]
    return "\n".join(lines)


def _why_second(first: Plan, second: Plan) -> str:
    """Name the parts in which the runner-up is slower."""
    gaps = {name: second.time.parts[name] - first.time.parts[name] for name in first.time.parts}
    slower = sorted(((gap, name) for name, gap in gaps.items() if gap > 0), reverse=True)[:3]
    quicker = sorted(((gap, name) for name, gap in gaps.items() if gap < 0))[:2]
    loss = second.time.total - first.time.total
    text = f"the second loses {format_seconds(loss)} a step ({loss / first.time.total:.1%})"
    text += "".join(f", {name} +{format_seconds(gap)}" for gap, name in slower)
    return text + "".join(f", though {name} -{format_seconds(-gap)}" for gap, name in quicker)
