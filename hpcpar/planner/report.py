"""A plan as one readable page."""

from __future__ import annotations

import dataclasses

from hpcpar.config.job import required
from hpcpar.planner import flops
from hpcpar.planner.money import RESTART_S
from hpcpar.planner.plan import Plan
from hpcpar.planner.search import faster_by_overlap, remedies
from hpcpar.units import format_bytes, format_count, format_seconds

PARTS = {
    "matmul": "matrix products", "attention": "attention", "elementwise": "norms, residuals, activations",
    "tensor": "tensor-parallel exchanges", "context": "context-parallel exchanges", "pipeline": "waiting for messages",
    "data": "data-parallel exchanges, exposed", "host": "copies to and from the host, exposed",
    "bubble": "pipeline bubble", "tied": "tied embedding", "optimizer": "optimizer",
}


def describe_plan(plan: Plan, efficiency: float | None = None) -> str:
    """Tell a plan in words and figures; `efficiency` adds the days at a stated share of the peak."""
    return "\n\n".join(["\n".join(lines) for lines in (
        _model(plan), _layout(plan), _memory(plan), _time(plan), _run(plan, efficiency))])


def _model(plan: Plan) -> list[str]:
    model = plan.job.model
    formula = flops.narayanan_parameters(model.layers, model.hidden, model.seq, model.vocab)
    by_formula = f"; 12lh^2(1 + 13/12h + (V+s)/12lh) = {format_count(formula)}" if model.kind == "gpt" else ""
    return [
        f"model        {plan.params:,} parameters ({format_count(plan.params)}{by_formula})",
        f"             {model.layers} layers, hidden {model.hidden}, {model.heads} heads, ffn {required(model.ffn)}, "
        f"sequence {model.seq}, vocabulary {model.vocab:,}",
        f"a step       {plan.model_flops:.3e} model FLOP, {plan.hardware_flops:.3e} with recomputation "
        f"({plan.job.layout.recompute}); attention counted in full",
    ]


def _layout(plan: Plan) -> list[str]:
    job, wish, pricing = plan.job, plan.job.layout, plan.pricing
    chunks = f" x {wish.chunks} chunks" if wish.chunks > 1 else ""
    uneven = "" if len(set(pricing.layers)) == 1 else " (uneven)"
    return [
        f"layout       {job.world_size} {plan.machine.name} = tp {wish.tp} x pp {wish.pp}{chunks} x dp {pricing.dp}"
        + (f" x cp {wish.cp}" if wish.cp > 1 else "")
        + f"; {wish.schedule}, ZeRO-{wish.zero_text}, recompute {wish.recompute}, sequence parallelism "
        + wish.sequence_text,
        f"             {pricing.num_microbatches} microbatches of {job.train.microbatch} a replica; "
        f"{max(pricing.layers)} layers a chunk{uneven}",
    ]


def _memory(plan: Plan) -> list[str]:
    names = [f.name for f in dataclasses.fields(plan.memory[0])]
    last, full = len(plan.memory) - 1, plan.fullest
    shown = sorted({0, full, last})
    lines = ["memory       a rank of " + "".join(f"{'stage ' + str(r):>14}" for r in shown)]
    for name in names:
        lines.append(f"  {name:<22} " + "".join(f"{format_bytes(getattr(plan.memory[r], name)):>14}" for r in shown))
    lines.append(f"  {'together':<22} " + "".join(f"{format_bytes(plan.memory[r].total):>14}" for r in shown))
    usable = plan.machine.chip.usable_bytes
    verdict, word = ("fits", "spare") if plan.spare_bytes >= 0 else ("DOES NOT FIT", "missing")
    lines.append(f"  {verdict}: {format_bytes(abs(plan.spare_bytes))} {word} of {format_bytes(usable)} that a "
                 f"{plan.machine.name} has for tensors (fullest: stage {full})")
    if plan.pricing.host_bytes:
        share = f"{plan.machine.host.share_gib:g} GiB" if plan.machine.host.share_gib else "not known"
        verdict = "" if plan.pricing.host_fits else "DOES NOT FIT: "
        lines.append(f"  {verdict}{format_bytes(plan.pricing.host_bytes)} a rank wait in the host's memory, of which a "
                     f"device's share is {share}")
    if not plan.fits:
        lines += [f"  would fit: {text}" for text in remedies(plan)] or ["  no single change makes it fit"]
    if plan.memory[full].total > 0.95 * usable and plan.fits:
        lines.append("  tight: less than 5% spare, and the allocator's own waste varies by as much")
    return lines


def _time(plan: Plan) -> list[str]:
    time, job = plan.time, plan.job
    numbers = plan.as_json()
    lines = [f"step         {format_seconds(time.total)} ({time.total:.3f} s)"]
    for name, seconds in time.parts.items():
        if seconds > 0.0005 * time.total:
            hidden = time.hidden.get(name, 0.0)
            beside = f"  (and {format_seconds(hidden)} hidden behind backward)" if hidden > 0.001 * time.total else ""
            if name == "tensor" and (faster := faster_by_overlap(plan)):
                beside = f"  ({faster})"
            lines.append(f"  {PARTS[name]:<36} {format_seconds(seconds):>10} {seconds / time.total:>6.1%}{beside}")
    if job.checkpoint.every:
        kept = plan.run.goodput
        stall = kept.stall_s / max(1.0, kept.interval_s / time.total)
        lines.append(f"  {'besides: checkpoint stall, averaged':<36} {format_seconds(stall):>10} "
                     f"{stall / time.total:>6.1%}")
    m = plan.pricing.num_microbatches
    ideal = (job.layout.pp - 1) / (job.layout.chunks * m)
    lines += [
        f"  bubble over work of the busiest rank {time.bubble:.1%}; (p-1)/(v m) = {ideal:.1%}",
        f"speed        {numbers['tflops_per_gpu']:.1f} model TFLOP/s a GPU, MFU {plan.mfu:.1%}, HFU {plan.hfu:.1%} "
        f"of the dense peak {plan.rank_peak_flops / 1e12:.4g} TFLOP/s",
        f"             {numbers['tokens_per_s_per_gpu']:,.1f} tokens/s a GPU, "
        f"{numbers['tokens_per_s_per_gpu'] * job.world_size:,.0f} in all",
    ]
    return lines


def _run(plan: Plan, efficiency: float | None) -> list[str]:
    job, run, kept = plan.job, plan.run, plan.run.goodput
    model_days, hardware_days = plan.pf_days()
    factor = round(6 * hardware_days / model_days)
    exact = [flops.pf_days(f * plan.steps) for f in (plan.model_flops, plan.hardware_flops)]
    lines = [
        f"run          {job.train.steps:,} steps, {format_count(run.tokens)} tokens",
        f"  PF-days    6PT = {model_days:,.0f} (model), {factor}PT = {hardware_days:,.0f} (hardware: "
        f"{'recomputed forward counted' if factor == 8 else 'no full recomputation'}); operation by operation "
        f"{exact[0]:,.0f} and {exact[1]:,.0f}",
        f"  at 100%    {run.days:.1f} days, {run.days * 24 * job.world_size:,.0f} GPU-hours",
        f"  goodput    {kept.share:.1%}: {run.days_with_failures:.1f} days, {run.gpu_hours:,.0f} GPU-hours, "
        f"{run.energy_mwh:,.0f} MWh" + (f", {run.money:,.0f} at {job.submit.price_per_gpu_hour:g} a GPU-hour"
                                        if job.submit.price_per_gpu_hour else ""),
        f"             a failure every {format_seconds(kept.mtbf_s)}, {format_seconds(RESTART_S)} to restart, a "
        f"checkpoint every {format_seconds(kept.interval_s)} (best: {format_seconds(kept.best_interval_s)}) that "
        f"stalls {format_seconds(kept.stall_s)}",
    ]
    if efficiency:
        rate = efficiency * plan.rank_peak_flops
        days = flops.train_days(hardware_days * flops.PF_DAY, job.world_size, rate)
        lines.append(f"  at {efficiency:.1%} of the peak, {factor}PT: {days:.1f} days")
    return lines
