"""Reads samples before they are asked for, in a thread, so that a step finds them in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

Read = Callable[[np.ndarray], np.ndarray]  # sample numbers [n] -> tokens [n, seq + 1] int64


class ReadAhead:
    """Takes the place of a `Read`: what was expected comes from memory, anything else is read at once.

    Holds the tokens of two steps: the one that is taken and the next. Numbers are compared, not places, so that a
    wrong expectation (a rollback, samples left out) costs time and never gives other tokens.
    """

    def __init__(self, read: Read):
        self._read = read
        self._reader = ThreadPoolExecutor(1, "reader")
        self._now: dict[bytes, Future[np.ndarray]] = {}
        self._next: dict[bytes, Future[np.ndarray]] = {}
        self.waited_s = 0.0  # of the caller, in all calls so far
        self.num_unexpected = 0  # calls that found nothing read ahead

    def expect(self, batches: Iterable[np.ndarray]) -> None:
        """Begin to read what the step after the coming one asks for; what the last step had is forgotten."""
        for reading in self._now.values():
            reading.cancel()  # never asked for: a step that was foreseen and did not come
        self._now, self._next = self._next, {n.tobytes(): self._reader.submit(self._read, n) for n in batches}

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """Return the tokens [n, seq + 1] of sample numbers [n]. Raises what reading raises."""
        start = time.perf_counter()
        coming = self._now.get(numbers.tobytes())
        self.num_unexpected += coming is None
        rows = self._read(numbers) if coming is None else coming.result()
        self.waited_s += time.perf_counter() - start
        return rows

    def close(self) -> None:
        """End the thread."""
        self._reader.shutdown(cancel_futures=True)
