"""How a run is getting on, read from its folder alone: no MPI, no torch, from any host that sees the folder."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hpcpar.config.job import Job
from hpcpar.config.load import load_job
from hpcpar.config.run_folder import RunFolder, read_lines
from hpcpar.config.surroundings import process_table
from hpcpar.errors import UserError
from hpcpar.planner.flops import model_flops
from hpcpar.planner.hardware import is_cpu, load_machine
from hpcpar.units import format_count, format_seconds

QUIET_S = 60.0
"""How long a run may give no sign, at least, before it is taken for dead."""
_RECENT = 20  # steps that speeds are taken from


@dataclass(frozen=True)
class RunStatus:
    """A run's state: running, done, stopped, failed, dead (no sign of life, no word), or not started."""

    path: Path
    state: str
    step: int = 0
    steps: int = 0
    loss: float | None = None
    val_loss: float | None = None
    step_s: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    ranks: int = 0
    left_s: float | None = None
    last_set: str = ""
    restarts: int = 0
    skipped: int = 0
    goodput: float | None = None
    quiet_s: float | None = None
    why: str = ""
    slow: str = ""
    waits: str = ""


def read_status(path: Path, now: float | None = None) -> RunStatus:
    """Read a run folder. Raises: UserError where there is none."""
    folder, now = RunFolder(path), time.time() if now is None else now
    if not folder.config.exists() and not folder.journal.exists():
        raise UserError(str(path), "is no run folder", "give the folder that hpcpar train --run made")
    job = load_job(folder.config) if folder.config.exists() else Job()
    journal, lines = read_lines(folder.journal), read_lines(folder.metrics)
    steps = [line for line in lines if "loss" in line]
    recent = [line["step_s"] for line in steps[-_RECENT:]]
    step_s = median(recent) if recent else None
    signs = _signs_of_life(folder)
    quiet_s = now - max(signs) if signs else None
    state, why = _state(folder, journal, quiet_s, max(QUIET_S, 3 * (step_s or 0)))
    starts = [line for line in journal if line["event"] == "start"]
    step = steps[-1]["step"] if steps else (starts[-1]["step"] if starts else 0)
    end = now if state == "running" else max([*(line["time"] for line in journal), *signs], default=now)
    tokens_per_s = median(line["tokens_per_s"] for line in steps[-_RECENT:]) if steps else None
    ranks = starts[-1]["ranks"] if starts else 0
    sets = [name for path in folder.checkpoints.glob("step-*") if (path / "manifest.json").exists()
            if (name := path.name).removeprefix("step-").isdigit()]
    slow = next((line for line in reversed(lines) if "slow_rank" in line), None)
    waits = next((line for line in reversed(lines) if "mean_waits_s" in line), None)
    return RunStatus(
        path, state, step, job.train.steps,
        loss=steps[-1]["loss"] if steps else None,
        val_loss=next((line["val_loss"] for line in reversed(lines) if "val_loss" in line), None),
        step_s=step_s,
        tokens_per_s=tokens_per_s,
        mfu=model_flops_utilization(job, tokens_per_s, ranks),
        ranks=ranks,
        left_s=(job.train.steps - step) * step_s if step_s is not None and state == "running" else None,
        last_set=max(sets, key=lambda name: int(name.removeprefix("step-")), default=""),
        restarts=max(0, len(starts) - 1),
        skipped=sum("skipped" in line for line in steps),
        goodput=sum(line["step_s"] for line in steps) / max(end - starts[0]["time"], 1e-9) if starts else None,
        quiet_s=quiet_s, why=why, waits=_shares(waits["mean_waits_s"], waits["mean_step_s"]) if waits else "",
        slow=f"rank {slow['slow_rank']} on {slow['host']} ({slow['ratio']} x)" if slow else "",
    )


def model_flops_utilization(job: Job, tokens_per_s: float | None, ranks: int) -> float | None:
    """Return the share of the dense peak that the model's FLOPs make, by the planner's count and its machines.

    None where there is no peak to speak of: in 32 or 64 bits, on a CPU, on a machine that the planner does not know.
    """
    gpu, precision = job.machine.gpu, job.train.precision
    if not ranks or tokens_per_s is None or precision not in ("bf16", "fp16") or is_cpu(gpu):
        return None
    try:
        peak = load_machine(gpu).peak_flops(precision)
    except UserError:
        return None
    flops = model_flops(job.model, 1) / job.model.seq  # a token
    return tokens_per_s * flops / (ranks * peak)


def _state(folder: RunFolder, journal: list[dict[str, Any]], quiet_s: float | None, limit_s: float) -> tuple[str, str]:
    if folder.failure.exists():  # an earlier start's is moved aside by the next one
        found = json.loads(folder.failure.read_text())
        return "failed", f"rank {found['rank']} on {found['host']}, step {found['step']}: {found['error']}: " \
                         f"{found['message']}"
    if not journal:
        return "not started", ""
    last = journal[-1]
    if last["event"] != "start":
        return last["event"], ""
    here = last.get("table") == process_table()
    alive = here and Path(f"/proc/{last['pid']}").exists()
    if quiet_s is not None and quiet_s < limit_s and (alive or not here):
        return "running", ""
    if alive:
        return "running", f"no step for {format_seconds(quiet_s or 0)}"
    return "dead", f"no sign of life for {format_seconds(quiet_s or 0)}, and no word about its end"


def _signs_of_life(folder: RunFolder) -> list[float]:
    signs = [line["time"] for line in read_lines(folder.journal)]
    for path in (folder.metrics, *folder.watch.glob("beat-*")):
        if path.exists():
            signs.append(path.stat().st_mtime)
    return signs


def rows(status: RunStatus) -> list[tuple[str, str]]:
    """Return what is to be shown, line by line."""
    def number(value: float | None, text: str) -> str:
        return "-" if value is None else text.format(value)

    folder = RunFolder(status.path)
    bad = f", {status.skipped} updates left out" if status.skipped else ""
    speed = "-"
    if status.tokens_per_s is not None and status.step_s is not None:
        speed = (f"{format_count(status.tokens_per_s)} tokens/s, {format_seconds(status.step_s)} a step on "
                 f"{status.ranks} rank{'s' * (status.ranks != 1)}")
    shown = [
        ("state", status.state + (f" ({status.why})" if status.why else "")),
        ("step", f"{status.step} of {status.steps}{bad}"),
        ("loss", number(status.loss, "{:.4f}") + (f" (validation {status.val_loss:.4f})" if status.val_loss else "")),
        ("speed", speed),
        *([("mfu", _mfu_row(status.mfu))] if status.mfu is not None else []),
        ("time left", "-" if status.left_s is None else format_seconds(status.left_s)),
        ("last checkpoint", status.last_set or "none yet"),
        ("restarts", str(status.restarts)),
        ("goodput", number(status.goodput, "{:.1%} of the time since the first start went into steps that count")),
    ]
    if status.waits:
        shown.append(("waits", f"{status.waits} of a step, the mean of all ranks"))
    if status.slow:
        shown.append(("slow", status.slow))
    return [*shown, ("logs", f"{folder.logs}{os.sep}  {folder.metrics}"
                     + (f"  {folder.failure}" if status.state == "failed" else ""))]


def _shares(waits_s: dict[str, float], step_s: float) -> str:
    return ", ".join(f"{axis} {seconds / step_s:.1%}" for axis, seconds in waits_s.items())


def _mfu_row(mfu: float) -> str:
    if mfu > 1:
        return f"{mfu:.0%}: ERROR, more than the peak: machine.gpu names a slower GPU than the run has"
    return f"{mfu:.1%} of the dense peak (model FLOPs, recomputation not counted)"


def describe(status: RunStatus) -> str:
    """Return the lines of `hpcpar status RUN`."""
    return "\n".join(f"{name:<16} {value}" for name, value in [("run", str(status.path)), *rows(status)])
