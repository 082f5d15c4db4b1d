"""Pictures of a run, drawn from the files in its folder."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from hpcpar.config.job import Job
from hpcpar.config.run_folder import RunFolder, read_lines
from hpcpar.errors import UserError


def draw_run(folder: RunFolder, job: Job) -> list[Path]:
    """Draw loss.png and, if there is a timeline, timeline.png into the run folder; return their paths."""
    lines = read_lines(folder.metrics)
    if not lines:
        raise UserError(str(folder.path), "has no metrics yet", "train first: hpcpar train JOB --run DIR")
    pictures = [_draw_loss(folder, job, lines)]
    if folder.timeline.exists():
        pictures.append(_draw_timeline(folder))
    return pictures


def _draw_loss(folder: RunFolder, job: Job, lines: list[dict[str, float]]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "val_loss" in line]
    axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], linewidth=1, label="training")
    axes.plot([s["step"] for s in held_out], [s["val_loss"] for s in held_out], "o", markersize=4, label="validation")
    axes.axhline(math.log(job.model.vocab), linestyle=":", color="grey", label=f"ln {job.model.vocab}: no knowledge")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=str(folder.path))
    axes.legend()
    path = folder.path / "loss.png"
    figure.savefig(path, dpi=110)
    return path


def _draw_timeline(folder: RunFolder) -> Path:
    """Draw every rank's measured actions in the last step: forwards, backwards, and waiting for messages."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    told = json.loads(folder.timeline.read_text())
    ranks = told["ranks"]
    played = [[(*_parts(name), start, end) for name, start, end in rank["events"]] for rank in ranks]
    several = any(len({chunk for chunk, *_ in events}) > 1 for events in played)
    colours = {"F": "tab:blue", "B": "tab:orange", "I": "tab:red", "W": "tab:olive", "r": "lightgrey", "s": "tab:green"}
    origin = min(start for events in played for *_, start, _ in events)
    least = max(end for events in played for *_, end in events) - origin
    least *= 0.004 * (2 + several)  # a narrower bar has no room for its number
    figure = Figure(figsize=(10, 1.2 + 0.35 * len(ranks)), layout="constrained")
    axes = figure.subplots()
    for row, events in enumerate(played):
        for chunk, kind, microbatch, start, end in events:
            axes.barh(row, (end - start) * 1e3, left=(start - origin) * 1e3, color=colours[kind], height=0.8,
                      edgecolor="white", linewidth=0.3)
            if kind in "FBIW" and end - start > least:
                text = f"{microbatch}\n({chunk})" if several else microbatch
                axes.text((start + end) / 2e-3 - origin * 1e3, row, text, ha="center", va="center", fontsize=6)
    axes.set_yticks(range(len(ranks)), [f"stage {r['pp_rank']} dp {r['dp_rank']} tp {r['tp_rank']}" for r in ranks])
    axes.invert_yaxis()
    names = {"F": "forward", "B": "backward", "I": "input's gradient", "W": "weights' gradients",
             "r": "waiting for a message", "s": "posting a send"}
    seen = {kind for events in played for _, kind, *_ in events}
    figure.legend(handles=[Patch(color=colours[k], label=n) for k, n in names.items() if k in seen], ncols=6,
                  fontsize=7, loc="outside lower center")
    numbers = "numbers are microbatches" + (", (chunks)" if several else "")
    axes.set(xlabel="ms", title=f"step {told['step']} as it was measured ({numbers})")
    path = folder.path / "timeline.png"
    figure.savefig(path, dpi=110)
    return path


def _parts(name: str) -> tuple[str, str, str]:
    """Cut an event's name ("3F12", "3rf12") into chunk, kind of action and microbatch."""
    found = re.fullmatch(r"(\d+)([a-zA-Z])[a-z]?(\d+)", name)
    assert found is not None
    return found[1], found[2], found[3]
