"""Ranks that share cores: who they are, and that one which gives way really gets less of a core."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hpcpar.comm.crowd import crowded_ranks

BUSY = """
import os, sys, time
from hpcpar.comm.crowd import give_way
os.sched_setaffinity(0, [int(sys.argv[2])])
give_way(int(sys.argv[1]))
deadline = time.monotonic() + 2
while time.monotonic() < deadline:
    pass
print(time.process_time())
"""


def test_ranks_share_cores_where_a_host_has_more_of_them_than_cores() -> None:
    assert crowded_ranks([("a", 0b11), ("a", 0b11), ("b", 0b11), ("b", 0b11), ("b", 0b11)]) == [2, 3, 4]
    assert crowded_ranks([("a", 1 << core) for core in range(8)]) == []  # each bound to one of its own
    assert crowded_ranks([("a", 0b1), ("a", 0b1)]) == [0, 1]


@pytest.mark.parametrize("own_sessions", [True, False])
def test_who_gives_way_gets_less_of_a_core(own_sessions: bool) -> None:
    """Seven levels are a share of 1 to 4.8. Both start at once, on one core."""
    core = str(min(os.sched_getaffinity(0)))
    busy = [subprocess.Popen([sys.executable, "-c", BUSY, level, core], stdout=subprocess.PIPE, text=True,
                             start_new_session=own_sessions) for level in ("7", "0")]
    behind, first = (float(each.communicate()[0]) for each in busy)
    assert first > 1.5 * behind


def test_a_rank_keeps_the_higher_level_that_it_was_started_with() -> None:
    code = "import os; from hpcpar.comm.crowd import give_way; give_way(3); give_way(5); give_way(2)\n" \
           "print(os.getpriority(os.PRIO_PROCESS, 0))"
    assert [subprocess.run(["nice", "-n", started, sys.executable, "-c", code], capture_output=True, text=True,
                           check=True).stdout.strip() for started in ("0", "12")] == ["5", "12"]


def test_the_session_gives_way_if_it_is_the_ranks_own() -> None:
    """A shell's session also holds what the user does next.

    A process that no session's start put into a group of its own (a container's first) has an empty file.
    """
    code = """if True:
        import time
        from hpcpar.comm.crowd import AUTOGROUP, give_way
        level = lambda: AUTOGROUP.read_text().split()[-1:] if AUTOGROUP.exists() else None
        before = level()
        give_way(4)
        deadline = time.monotonic() + 2
        while level() == before and time.monotonic() < deadline:
            time.sleep(0.05)
        print(before, level(), sep=" then ")"""

    def said(own_session: bool) -> list[str]:
        return subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True,
                              start_new_session=own_session).stdout.strip().split(" then ")

    before, after = said(own_session=False)
    assert after == before
    assert said(own_session=True) == (["None", "None"] if before == "None" else ["['0']", "['4']"])
