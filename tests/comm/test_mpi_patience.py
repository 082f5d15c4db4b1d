"""How long a rank that waits sleeps at a time, with others that ring and without."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from hpcpar.comm.mpi_patience import Patience
from hpcpar.comm.mpi_work import Home, MPIWork, Nobody

PATIENCE = Patience(polls=1, longest_s=1e-3, longest_rung_s=8e-3)
OWN, HERE, ELSEWHERE = 2, 3, 9  # global ranks: this one, one of this host, and one of another


class Bells:
    """Nobody rings; says how long each sleep might have been."""

    def __init__(self, direct: bool = True) -> None:
        self.sleeps: list[float] = []
        self.direct = direct

    def ring(self, indices: object) -> None:
        pass

    def sleep(self, is_over: Callable[[], bool], longest_s: float) -> None:
        self.sleeps.append(longest_s)
        if not is_over():
            time.sleep(longest_s)


class Request:
    """A message on its way."""

    def __init__(self) -> None:
        self.arrived = False

    def Test(self, status: object = None) -> bool:
        return self.arrived


class Recorded(Patience):
    """Tells how it was asked to wait."""

    asked: tuple[object, ...] = ()

    def wait(self, is_complete: Callable[[], bool], timeout_s: float, *asked: Any) -> None:
        object.__setattr__(self, "asked", asked)


def sleeps(beside: bool) -> list[float]:
    bells: Any = Bells()
    PATIENCE.wait(lambda: len(bells.sleeps) > 12, 60, True, bells, beside)
    return bells.sleeps  # type: ignore[no-any-return]


def test_a_wait_that_is_rung_sleeps_as_long_as_it_has_lasted() -> None:
    found = sleeps(beside=False)
    assert 1e-3 <= found[0] <= found[-1] == 8e-3 and found == sorted(found)


def test_what_moves_only_when_looked_at_is_looked_at() -> None:
    assert set(sleeps(beside=True)) == {1e-3}


def home_with(bells: Any, outbox: bool = False) -> Home:
    world: Any = SimpleNamespace(rank=OWN, Iprobe=lambda: False)
    mail: Any = SimpleNamespace(progress=lambda: None) if outbox else None
    return Home(world, {OWN: 0, HERE: 1}, bells, mail, Recorded(), Nobody())


def message(home: Home, peer: int) -> tuple[MPIWork, Request]:
    request: Any = Request()
    return MPIWork([(request, None, None)], [], home, timedelta(seconds=1), set(), 0, peer), request


@pytest.mark.parametrize("peer", [OWN, ELSEWHERE])
def test_a_wait_knows_what_else_is_in_flight(peer: int) -> None:
    """OWN stands for a message from anyone."""
    bells = Bells()
    home = home_with(bells)
    patience: Any = home.patience
    (near, _), (far, far_request) = message(home, HERE), message(home, peer)
    near.wait()
    assert patience.asked == (True, bells, True)
    far.wait()
    assert patience.asked == (True, None, True)
    far_request.arrived = True
    assert far.is_completed() and not home.unrung
    near.wait()
    assert patience.asked == (True, bells, False)


@pytest.mark.parametrize("outbox", [False, True])
def test_messages_that_need_their_sender_are_looked_at(outbox: bool) -> None:
    bells = Bells(direct=False)
    home = home_with(bells, outbox)
    patience: Any = home.patience
    near, request = message(home, HERE)
    near.wait()
    assert patience.asked == (True, bells, not outbox)
    request.arrived = True
    assert near.is_completed() and not home.unrung


def test_a_wait_ends_with_its_time() -> None:
    bells: Any = Bells()
    with pytest.raises(TimeoutError, match=r"did not complete in 0\.01 s"):
        PATIENCE.wait(lambda: False, 0.01, True, bells)
