"""What every program of the benchmark trains, and how it is measured: shape, tokens, seconds, memory; only torch."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HIDDEN, LAYERS, HEADS, SEQ, VOCAB = 512, 8, 8, 256, 8192
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0
WARM_UP = 2  # steps that are not timed
Weights = dict[str, Tensor]  # by hpcpar's names
Step = Callable[[int], float | None]  # of this number; returns the rank's loss, None where another stage has it


class Work(NamedTuple):
    """What a peer's rank is asked for. First weights are given apart: a step that kept them would be charged for it."""

    tp: int
    pp: int
    dp: int
    zero: int  # what is sharded over dp, where the program leaves a choice
    batch: int  # sequences a step, over all replicas
    microbatch: int  # sequences, of a pipeline

    @property
    def own_batch(self) -> int:
        """Sequences a step of one replica."""
        return self.batch // self.dp


def rows(first: int, count: int) -> Tensor:
    """Samples [first, first + count) of the benchmark's data: [count, seq + 1] random tokens, equal on all sides."""
    pool = torch.randint(VOCAB, (256, SEQ + 1), generator=torch.Generator().manual_seed(1))
    return pool[torch.arange(first, first + count) % len(pool)]


def timed(step: Step, barrier: Callable[[], object], steps: int) -> tuple[float, list[float | None]]:
    """Seconds a step after the warm-up, and the losses of all steps."""
    losses = [step(number) for number in range(WARM_UP)]
    barrier()
    start = time.perf_counter()
    losses += [step(WARM_UP + number) for number in range(steps)]
    barrier()
    return (time.perf_counter() - start) / steps, losses


def peak_memory(step: Callable[[], object]) -> dict[str, float]:
    """Bytes of this process; a page that several processes share counts in parts, one part to each (PSS).

    "peak": the most during a step that is not timed, looked at every 20 ms; "kept": what remains after it when malloc
    has given free pages back. "resident": VmHWM, the most ever, shared pages whole.
    """
    held, done = [_bytes_of("smaps_rollup", "Pss")], threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            held.append(_bytes_of("smaps_rollup", "Pss"))

    looker = threading.Thread(target=look)
    looker.start()
    step()
    done.set()
    looker.join()
    ctypes.CDLL(None).malloc_trim(0)
    return {"peak": max(held), "kept": _bytes_of("smaps_rollup", "Pss"), "resident": _bytes_of("status", "VmHWM")}


def _bytes_of(file: str, name: str) -> float:
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
