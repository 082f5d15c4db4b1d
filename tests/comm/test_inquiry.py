"""Two hosts' witnesses ask at the same time; one host falls silent; one never had a witness."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from hpcpar.comm import inquiry
from hpcpar.comm.inquiry import Inquiry
from hpcpar.comm.recorder import Call
from hpcpar.comm.verdict import Testimony as Told
from hpcpar.config.run_folder import RunFolder

HOSTS = {"a": [0, 1], "b": [2, 3], "c": [4, 5]}
CALL = Call(3, "all_reduce", "tp 0,1", 64, 1.0, 2.0, 0.0, 7, "x.py:1 in f", 5, -1, "F0")


def told(host: str) -> list[Told]:
    return [Told(rank, "waiting", 9.0, True, 5.0, 7, "step", "F0", CALL, (CALL, CALL), ("x.py:1 in f",))
            for rank in HOSTS[host]]


@pytest.fixture
def part(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.watch.mkdir(parents=True)
    return lambda host: Inquiry(run, host, HOSTS)


def test_two_that_ask_at_the_same_time_hear_each_other(part) -> None:
    parts = {host: part(host) for host in HOSTS}
    names = {host: parts[host].ask() for host in HOSTS}  # nobody has looked for questions before asking
    heard = {}

    def wait(host: str) -> None:
        heard[host] = parts[host].answers(names[host], told(host))

    threads = [threading.Thread(target=wait, args=(host,)) for host in HOSTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for host in HOSTS:
        others, silent = heard[host]
        assert silent == [] and sorted(others, key=lambda one: one.rank) == [
            one for other in sorted(HOSTS) if other != host for one in told(other)]


def test_silent_is_who_beat_once_and_neither_beats_nor_answers(part, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inquiry, "ANSWER_S", 1.0)
    part("b").beat(told("b"))  # c has no witness: it never beats
    assert part("a").answers(part("a").ask(), told("a")) == ([], ["b"])
    assert part("a").neighbours_beat() == 1 and part("b").neighbours_beat() == -1


def test_of_a_silent_hosts_ranks_the_last_beat_is_told(part, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = HOSTS["b"][0]
    part("b").beat([Told(rank, "waiting", 1.5, step=7, phase="step")])
    then = inquiry.time.time()
    monkeypatch.setattr(inquiry.time, "time", lambda: then + 20)
    seen = part("a").last_seen(rank)
    assert (seen.manner, seen.step, seen.phase) == ("waiting", 7, "step") and 21 < seen.quiet_s < 22
    assert part("a").last_seen(HOSTS["c"][0]) == Told(HOSTS["c"][0], "working")  # it never had a witness
