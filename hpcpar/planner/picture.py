"""A plan in pictures: the pipeline's timeline, memory by stage, time by part, and one HTML page with all of it."""

from __future__ import annotations

import dataclasses
import html
from pathlib import Path
from typing import Any

from hpcpar.layout.schedule import Kind
from hpcpar.planner.plan import Plan
from hpcpar.planner.report import PARTS, describe_plan
from hpcpar.planner.timeline import play, schedule_of

MANY = 24  # microbatches drawn at most: the rest repeats
COLOURS = {Kind.FORWARD: "#4c78a8", Kind.BACKWARD: "#f58518", Kind.BACKWARD_INPUT: "#f58518",
           Kind.BACKWARD_WEIGHT: "#e8b878"}


def draw_plan(plan: Plan, folder: Path) -> list[Path]:
    """Write timeline.png, memory.png, parts.png and plan.html into `folder`; return their paths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw, size in (("timeline", _timeline, (12, 6)), ("memory", _memory, (10, 5)), ("parts", _parts, (9, 4))):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(plan, figure.subplots())
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=110)
    pictures = "\n".join(f'<p><img src="{path.name}" alt="{path.stem}" style="max-width:100%"></p>' for path in written)
    page = folder / "plan.html"
    page.write_text(f"<!doctype html><meta charset='utf-8'><title>Plan</title><body style='max-width:75em;margin:auto'>"
                    f"<h1>Plan</h1><pre>{html.escape(describe_plan(plan))}</pre>\n{pictures}\n", encoding="utf-8")
    return [*written, page]


def _timeline(plan: Plan, axes: Any) -> None:
    pricing, wish = plan.pricing, plan.job.layout
    num = pricing.num_microbatches
    shown = min(num, max(2, -(-MANY // wish.pp)) * wish.pp)  # in whole rounds, past the fill
    if pricing.own:
        schedule, shown = pricing.own, num
    else:
        schedule = schedule_of(wish.schedule, wish.pp, shown, wish.chunks)
    spans = play(schedule, [c.forward.total for c in pricing.chunks], [c.backward.total for c in pricing.chunks],
                 pricing.boundary_s if wish.pp > 1 else 0.0)
    for kind, colour in COLOURS.items():
        for rank in range(wish.pp):
            bars = [(span.start, span.end - span.start) for action, span in spans.items()
                    if action.kind is kind and pricing.chunk_ranks[action.chunk] == rank]
            axes.broken_barh(bars, (rank - 0.4, 0.8), facecolors=colour, edgecolors="white", linewidth=0.3)
    axes.invert_yaxis()
    axes.set(xlabel="seconds", ylabel="stage",
             title=f"{wish.schedule}: {shown} of {num} microbatches (forward blue, backward orange)")


def _memory(plan: Plan, axes: Any) -> None:
    ranks = range(len(plan.memory))
    bottom = [0.0] * len(plan.memory)
    for field in dataclasses.fields(plan.memory[0]):
        heights = [getattr(m, field.name) / 2**30 for m in plan.memory]
        axes.bar(ranks, heights, bottom=bottom, label=field.name)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.axhline(plan.machine.chip.usable_bytes / 2**30, color="black", linestyle="--", label="what a device has")
    axes.set(xlabel="stage", ylabel="GiB a rank", title="memory by stage")
    axes.legend(fontsize="small", ncols=3)


def _parts(plan: Plan, axes: Any) -> None:
    parts = {PARTS[name]: seconds for name, seconds in plan.time.parts.items() if seconds > 0.001 * plan.time.total}
    axes.barh(list(parts), list(parts.values()))
    axes.invert_yaxis()
    axes.set(xlabel="seconds of a step", title=f"a step of {plan.time.total:.2f} s, MFU {plan.mfu:.1%}")
