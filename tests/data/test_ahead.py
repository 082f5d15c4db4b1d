"""Reading ahead: what is expected is read once and early, what is not is read at once, and both are the same tokens."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from hpcpar.data.ahead import ReadAhead
from tests.data.test_sampler import order


class Disk:
    """A source of tokens that counts its reads by thread; with `gate` closed it does not answer."""

    def __init__(self) -> None:
        self.read_by: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.order = order(50)

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        assert self.gate.wait(10)
        self.read_by.append(threading.current_thread().name.split("_")[0])
        return self.order.tokens(numbers)


def batches(step: int) -> list[np.ndarray]:
    return [np.arange(4 * step, 4 * step + 2), np.arange(4 * step + 2, 4 * step + 4)]


def test_all_steps_but_the_first_are_read_ahead() -> None:
    disk = Disk()
    ahead = ReadAhead(disk)
    for step in range(5):
        ahead.expect(batches(step + 1))
        for numbers in batches(step):
            assert (ahead(numbers) == disk.order.tokens(numbers)).all()
    ahead.close()
    assert ahead.num_unexpected == 2
    assert disk.read_by.count("MainThread") == 2 and disk.read_by.count("reader") >= 8


def test_a_second_use_of_a_microbatch_reads_nothing() -> None:
    """Both ends of a pipeline may be one rank's chunks."""
    disk = Disk()
    ahead = ReadAhead(disk)
    ahead.expect(batches(0))
    ahead.expect([])
    for _ in range(3):
        ahead(batches(0)[0])
    ahead.close()
    assert set(disk.read_by) == {"reader"} and len(disk.read_by) <= 2 and not ahead.num_unexpected


def test_a_step_that_nobody_foresaw_gets_its_own_tokens() -> None:
    disk = Disk()
    ahead = ReadAhead(disk)
    ahead.expect(batches(1))
    ahead.expect(batches(2))
    rolled_back = batches(9)[0]
    assert (ahead(rolled_back) == disk.order.tokens(rolled_back)).all() and ahead.num_unexpected == 1
    ahead.close()


def test_a_step_waits_for_a_slow_disk_and_the_wait_is_counted() -> None:
    disk = Disk()
    ahead = ReadAhead(disk)
    disk.gate.clear()
    ahead.expect(batches(1))
    ahead.expect([])
    threading.Timer(0.05, disk.gate.set).start()
    ahead(batches(1)[0])
    ahead.close()
    assert ahead.waited_s > 0.03 and disk.read_by[0] == "reader"


def test_what_the_thread_raises_comes_out_where_the_tokens_are_asked_for() -> None:
    def broken(numbers: np.ndarray) -> np.ndarray:
        raise OSError("gone")

    ahead = ReadAhead(broken)
    ahead.expect(batches(1))
    ahead.expect([])
    with pytest.raises(OSError, match="gone"):
        ahead(batches(1)[0])
    ahead.close()
