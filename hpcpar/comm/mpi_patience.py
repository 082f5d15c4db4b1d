"""How a rank waits for MPI: part of `mpi_backend`, which any PyTorch user can take along with this file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # who only waits for a condition needs no MPI
    from .mpi_bells import Bells


@dataclass(frozen=True)
class Patience:
    """How a rank waits: `polls` tests that yield the core, then tests with sleeps between that grow with the wait.

    A rank that only spins takes the core from computing ones (8 ranks on 2 cores, seven waiting: the eighth takes
    4 times as long). One that sleeps early keeps others waiting, for MPI moves data only inside its own calls: 50 polls
    make small all-reduces 2.5 times as long there, 300 cost nothing measurable. Between two ranks nobody else waits, so
    a wait for a message sleeps a tenth of what it has lasted: 8 pipeline stages on 2 cores take 2.0 s a step instead of
    2.6. Collectives do not bear a tenth (8 tp ranks 4.2 s, not 2.8): theirs is a fiftieth. Where who brings what is
    waited for rings, a sleep may last as long as the wait already has: only a byte that was missed makes it longer; but
    while something is in flight for which nobody rings, no longer than others' do.
    """

    polls: int = 300
    sleep_s: float = 50e-6
    longest_s: float = 2e-3
    longest_rung_s: float = 20e-3

    def wait(self, is_complete: Callable[[], bool], timeout_s: float, message: bool,
             bells: Bells | None = None, beside: bool = False) -> None:
        """Return once `is_complete()`; raise TimeoutError after `timeout_s`.

        `message`: of two ranks only. `bells`: who brings what is waited for rings. `beside`: nobody rings for something
        else, which `is_complete` moves too.
        """
        start, longest_s = time.monotonic(), self.longest_s if beside else self.longest_rung_s
        for _ in range(min(self.polls, 20 if bells else 100 if message else self.polls)):
            if is_complete():
                return
            os.sched_yield()
        while not is_complete():
            waited = time.monotonic() - start
            if waited > timeout_s:
                raise TimeoutError(f"an MPI operation did not complete in {timeout_s:g} s: other ranks did not arrive")
            if bells:
                bells.sleep(is_complete, min(max(waited, self.longest_s), longest_s))
            else:
                time.sleep(min(max(waited / (10 if message else 50), self.sleep_s), self.longest_s))
