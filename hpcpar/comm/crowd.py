"""Hosts with fewer cores than ranks: who is on one, and who goes first there."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hpcpar.layout.precedence import nice_levels

Place = tuple[str, int]  # a rank's host and cores, a bit each
AUTOGROUP = Path("/proc/self/autogroup")
_TRIES = 1000


def place(host: str) -> Place:
    """Return this rank's place."""
    return host, sum(1 << core for core in os.sched_getaffinity(0))


def crowded_ranks(places: Sequence[Place]) -> list[int]:
    """Return the ranks on hosts that have more ranks than cores.

    Bound ranks have cores of their own, others all of the host's: together they are the host's either way.
    """
    cores: dict[str, int] = {}
    for host, mine in places:
        cores[host] = cores.get(host, 0) | mine
    count = Counter(host for host, _ in places)
    return [rank for rank, (host, _) in enumerate(places) if count[host] > cores[host].bit_count()]


def let_later_stages_first(places: Sequence[Place], global_rank: int, chunk_ranks: Sequence[int], pp_rank: int) -> None:
    """Give way to later stages if this rank's host is crowded; for the process's life, as only root takes it back."""
    if global_rank in crowded_ranks(places):
        give_way(nice_levels(chunk_ranks)[pp_rank])


def give_way(level: int) -> None:
    """Let ranks of lower nice levels go first; who was started with a higher one keeps it. Cost: none.

    Where Linux shares cores between sessions first (autogroup) and the launcher gave this rank one of its own, as
    MPICH's does, it is the session that must give way.
    """
    if level > os.getpriority(os.PRIO_PROCESS, 0):
        os.setpriority(os.PRIO_PROCESS, 0, level)
        if os.getsid(0) == os.getpid() and AUTOGROUP.exists():
            threading.Thread(target=_session_gives_way, args=(level,), daemon=True).start()


def _session_gives_way(level: int) -> None:
    """Ask until the kernel listens: it takes such a wish once in a tenth of a second, from all users together."""
    for _ in range(_TRIES):
        try:
            AUTOGROUP.write_text(str(level))
        except BlockingIOError:
            time.sleep(random.uniform(0.05, 0.15))
        except OSError:  # a container's /proc may be closed: then all go on as before
            return
        else:
            return
