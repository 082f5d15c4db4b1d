"""What rank 0 tells of a run: a JSON line a step, TensorBoard, and a line that a person can follow."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from hpcpar.config.job import Job
from hpcpar.config.run_folder import RunFolder, read_lines
from hpcpar.config.surroundings import leave_stdout
from hpcpar.train.state import Progress
from hpcpar.train.step import StepResult
from hpcpar.train.waits import shares
from hpcpar.units import format_bytes, format_seconds

QUIET_S = 5.0  # seconds between lines where nobody watches
WARM_STEPS = 2  # of a start, that take longer: memory is first touched, kernels are chosen


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process has held: on its GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _columns() -> int | None:
    """Return how much fits into a line of the terminal; None where there is none, or behind mpirun."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns - 1
    except (OSError, ValueError):
        return None


class Metrics:
    """Writes a run's figures; made on rank 0 only."""

    def __init__(self, run: RunFolder, job: Job, progress: Progress, device: torch.device, live: bool):
        self._folder, self._job, self._device = run, job, device
        self._live = live or sys.stdout.isatty()
        kept = [line for line in read_lines(run.metrics) if line["step"] <= progress.step]
        draft = run.metrics.with_name(f".{run.metrics.name}.tmp")
        draft.write_text("".join(json.dumps(line) + "\n" for line in kept))
        draft.replace(run.metrics)
        self._file = run.metrics.open("ab", buffering=0)
        self._unwritten = bytearray()
        from hpcpar.train.curves import Curves  # here: only rank 0 needs TensorBoard's packages

        self._curves = Curves(run.path / "tensorboard", progress.step + 1)
        self._num_failed = 0
        self._shown = 0.0
        self._rate = 0.0  # running mean of seconds a token
        self._num_steps = 0  # since this start
        self.recent_s: deque[float] = deque(maxlen=100)  # of warm steps that took the whole batch

    def journal(self, event: str, **what: Any) -> None:
        """Add a line to the journal: a start, or how it ended."""
        with self._folder.journal.open("a") as file:
            file.write(json.dumps({"event": event, "time": time.time(), **what}) + "\n")

    def step(self, progress: Progress, result: StepResult, step_s: float, waits: Mapping[str, float],
             first_sample: int, samples_hash: str) -> None:
        """Note a step that has just ended; `waits` are this rank's seconds by axis (`train/waits`)."""
        tokens = len(result.samples) * self._job.model.seq
        line = {
            "step": progress.step, "tokens": progress.samples * self._job.model.seq, "loss": result.loss,
            "grad_norm": result.grad_norm, "lr": result.lr, "step_s": round(step_s, 6),
            "tokens_per_s": round(tokens / step_s, 1), "memory_bytes": peak_memory(self._device),
            "samples_hash": samples_hash, "first_sample": first_sample,
            "waits_s": {axis: round(seconds, 6) for axis, seconds in waits.items()},
        }
        if result.skipped:
            line["skipped"] = result.skipped
        if self._job.train.precision == "fp16":
            line["loss_scale"] = progress.loss_scale
        self._write(line)
        self._curves.add(progress.step, loss=result.loss, grad_norm=result.grad_norm, lr=result.lr,
                         tokens_per_s=tokens / step_s)
        self._num_steps += 1
        if self._num_steps > WARM_STEPS and len(result.samples) == self._job.train.global_batch:
            self.recent_s.append(step_s)
        self._rate = step_s / tokens if not self._rate else 0.9 * self._rate + 0.1 * step_s / tokens
        self._show(progress, line)

    def event(self, step: int, **what: Any) -> None:
        """Note something that is no step: a rollback, a slow rank."""
        self._write({"step": step, **what})

    def validation(self, step: int, val_loss: float) -> None:
        """Note a validation."""
        self._write({"step": step, "val_loss": val_loss})
        self._curves.add(step, val_loss=val_loss)
        self.say(f"step {step}: validation loss {val_loss:.4f}")

    def saved(self, step: int, num_bytes: int, save_s: float, stall_s: float) -> None:
        """Note a published set: how long it took, and how long the loop stood still for it."""
        self._write({"step": step, "save_s": round(save_s, 6), "stall_s": round(stall_s, 6), "save_bytes": num_bytes})

    def save_failed(self, step: int, why: str) -> None:
        """Note a failed save, and how many there were since this start."""
        self._num_failed += 1
        self._write({"step": step, "save_failed": why, "saves_failed": self._num_failed})

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self._print(("\r\x1b[K" if self._live else "") + text)

    def close(self) -> None:
        """Write what is buffered, or say what is lost."""
        self._flush()
        if self._unwritten:
            self.say(f"{self._folder.metrics}: {self._unwritten.count(10)} lines are lost: the disk is still full")
        self._file.close()
        self._curves.close()
        leave_stdout()

    def _write(self, line: dict[str, Any]) -> None:
        """Add a line; what a full disk does not take waits in memory: no reason to lose the run."""
        held = bool(self._unwritten)
        self._unwritten += json.dumps(line).encode() + b"\n"
        failed = self._flush()
        if failed and not held:
            self.say(f"{self._folder.metrics}: {failed}; its lines wait in memory, training goes on")

    def _flush(self) -> str:
        """Write what waits; return why that failed, if it did."""
        try:
            while self._unwritten:
                del self._unwritten[: self._file.write(self._unwritten)]
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def _print(self, text: str, end: str = "\n") -> None:
        try:
            print(text, end=end, flush=True)
        except BrokenPipeError:  # head has seen enough
            leave_stdout()
        except OSError:  # a full disk beneath a log; Python keeps the text, and tries again with the next
            logging.exception("stdout")

    def _show(self, progress: Progress, line: dict[str, Any]) -> None:
        steps, now = self._job.train.steps, time.monotonic()
        last = progress.step == steps
        if not self._live and not last and now - self._shown < QUIET_S:
            return
        self._shown = now
        left = (steps - progress.step) * self._job.train.global_batch * self._job.model.seq * self._rate
        done = int(20 * progress.step / max(1, steps))
        waits = shares(line["waits_s"], line["step_s"])
        text = (f"step {progress.step}/{steps} [{'#' * done}{'.' * (20 - done)}] loss {line['loss']:.4f}  "
                f"grad {line['grad_norm']:.2f}  {line['tokens_per_s']:,.0f} tokens/s  left {format_seconds(left)}  "
                f"memory {format_bytes(line['memory_bytes'])}{'  waits ' * bool(waits)}{waits}"
                f"{'  SKIPPED' if 'skipped' in line else ''}")
        if self._live:
            text = text[:_columns()]  # a line that wraps could not be wiped
        self._print(f"\r\x1b[K{text}" if self._live else text, end="" if self._live and not last else "\n")
