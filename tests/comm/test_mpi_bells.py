"""Bells of two ranks that are played in one process."""

from __future__ import annotations

import mmap
import os
import select
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator

import pytest

from hpcpar.comm.mpi_bells import Bells

LONG_S = 60.0  # nobody sleeps so long here
PROBE = """
from mpi4py import MPI
from hpcpar.comm.mpi_bells import open_bells
bells = open_bells(MPI.COMM_WORLD)
if MPI.COMM_WORLD.rank == 0:
    print(MPI.Get_library_version().split()[0], bells.direct)
"""


@pytest.fixture
def pair() -> Iterator[tuple[Bells, Bells, socket.socket]]:
    """Two bells, and the first one's socket."""
    memory, name = mmap.mmap(-1, 128), uuid.uuid4().hex
    addresses = [f"\0bells-{name}-{rank}" for rank in (0, 1)]
    sockets = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in addresses]
    for each, address in zip(sockets, addresses, strict=True):
        each.bind(address)
    yield Bells(memory, sockets[0], 0, addresses), Bells(memory, sockets[1], 1, addresses), sockets[0]
    for each in sockets:
        each.close()


def has_rung(own: socket.socket) -> bool:
    return bool(select.select([own], [], [], 0)[0])


def test_a_sleeper_is_woken(pair: tuple[Bells, Bells, socket.socket]) -> None:
    first, second, own = pair
    looked = threading.Event()

    def not_yet() -> bool:
        looked.set()
        return False

    sleeper = threading.Thread(target=first.sleep, args=(not_yet, LONG_S), daemon=True)
    sleeper.start()
    assert looked.wait(LONG_S / 2)  # it has said by now that it sleeps
    second.ring([0])
    sleeper.join(LONG_S / 2)
    assert not sleeper.is_alive() and not has_rung(own)


def test_who_is_awake_is_not_rung(pair: tuple[Bells, Bells, socket.socket]) -> None:
    _, second, own = pair
    second.ring([0])
    assert not has_rung(own)


def test_what_is_over_before_the_sleep_needs_none(pair: tuple[Bells, Bells, socket.socket]) -> None:
    first, second, own = pair
    first.sleep(lambda: True, LONG_S)
    second.ring([0])  # it is awake again
    assert not has_rung(own)


def test_a_byte_too_many_is_forgotten_and_none_blocks(pair: tuple[Bells, Bells, socket.socket]) -> None:
    first, second, own = pair
    assert all(second.send(0) for _ in range(1000))  # more than a socket holds
    first.drain()
    assert not has_rung(own)
    own.close()
    assert second.send(0) is False


def test_messages_that_need_their_sender_are_known() -> None:
    """As where a rank may not read another's memory."""
    environment = {**os.environ, "MPIR_CVAR_CH4_CMA_ENABLE": "0"}
    done = subprocess.run(["mpirun", "-n", "3", sys.executable, "-c", PROBE], env=environment, capture_output=True,
                          text=True, timeout=100, check=True)
    library, direct = done.stdout.split()
    if library != "MPICH":
        pytest.skip("the variable is MPICH's")
    assert direct == "False"
