"""The recorder's memory, and the verdicts on what several ranks' recorders say: no process, every case."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpcpar.comm.inquiry import main_stack
from hpcpar.comm.recorder import Call, LastWords, Recorder, format_ranks, parse_ranks
from hpcpar.comm.verdict import Testimony as Told
from hpcpar.comm.verdict import judge, mismatch

RANKS = {"tp": ((0, 1), (2, 3)), "dp": ((0, 2), (1, 3))}
PROGRAM = (("tp", "all_reduce", 4000, "a.py:1 in first"), ("tp", "all_gather", 12000, "a.py:2 in second"),
           ("dp", "all_reduce", 40, "a.py:3 in third"))


def play(recorder: Recorder, rank: int, program: list[tuple[str, str, int, str]], step: int) -> None:
    recorder.note(step=step, phase="step", action=f"F{step}")
    for axis, operation, num_bytes, _ in program:
        group = next(ranks for ranks in RANKS[axis] if rank in ranks)
        number = recorder.begin(recorder.group(axis, group), operation, num_bytes)
        recorder.wait(number)
        recorder.end(number)


def witnessed(deeds: dict[int, list[list[tuple[str, str, int, str]]]], waiting: tuple[int, ...] = (),
            manner: str = "working") -> list[Told]:
    """Record each rank's steps; the last call of the `waiting` stays open."""
    told = []
    for rank, steps in deeds.items():
        recorder, sites = Recorder(), []
        for step, program in enumerate(steps):
            play(recorder, rank, program, step)
            sites += [site for *_, site in program]
        recorded = LastWords.read(recorder.fd).calls
        calls = tuple(replace(call, site=site, begun=float(number))  # as if all ranks were in step
                      for number, (call, site) in enumerate(zip(recorded, sites[-len(recorded):], strict=True)))
        open_call = replace(calls[-1], waited=calls[-1].begun, ended=0.0) if rank in waiting else None
        told.append(Told(rank, "waiting" if open_call else manner, 99.0, False, 10.0, len(steps) - 1, "step", "F",
                              open_call, calls))
    return told


def steps_of(*last: tuple[str, str, int, str], num: int = 3) -> list[list[tuple[str, str, int, str]]]:
    return [list(PROGRAM)] * num + [list(last)]


A, B, C = PROGRAM
WELL = steps_of(A, B, C)


@pytest.mark.parametrize("guilty", [0, 1, 2, 3])
@pytest.mark.parametrize(("mine", "others", "says"), [
    ([*steps_of(A, C), [A]], steps_of(A, B), "skipped a collective (all_gather at a.py:2 in second)"),
    (steps_of(B, A, C), steps_of(A, B, C), "misordered collectives"),
    (steps_of(("tp", "all_reduce", 4004, A[3]), B, C), WELL, "mis-shaped collective, 4004 bytes where the others have"),
    (steps_of(A, A, B, C), WELL, "others did not make"),
], ids=["skip", "swap", "shape", "extra"])
def test_the_odd_rank_is_named_even_in_groups_of_two(guilty, mine, others, says) -> None:
    """A pair is split evenly: the other pair, which plays the same program, decides."""
    deeds = {rank: mine if rank == guilty else others for rank in range(4)}
    found = judge(witnessed(deeds, waiting=(0, 1, 2, 3)))
    assert found is not None and found.error == "Mismatch"
    assert says in found.message
    assert found.rank == guilty and "group tp" in found.message


def test_a_rank_that_ended_early_is_named() -> None:
    deeds = {0: WELL, 1: WELL, 2: WELL, 3: steps_of(num=3)}
    told = witnessed(deeds, waiting=(0, 1, 2))
    told[3] = replace(told[3], manner="done")
    found = judge(told)
    assert found is not None and found.rank == 3 and "it is done" in found.message


def test_without_trouble_only_operation_and_bytes_count() -> None:
    other_line = ("tp", "all_reduce", 4000, "b.py:9 in elsewhere")
    assert mismatch(witnessed({0: WELL, 1: steps_of(other_line, B, C)}), strict=False) is None
    assert mismatch(witnessed({0: WELL, 1: steps_of(B, A, C)}), strict=False) is not None


def test_ranks_that_only_are_not_equally_far_are_no_mismatch() -> None:
    for strict in (True, False):
        assert mismatch(witnessed({0: WELL, 1: steps_of(A), 2: steps_of(A, B), 3: WELL}), strict) is None


def test_the_mark_remembers_what_the_ring_has_forgotten() -> None:
    long = [list(PROGRAM)] * 300
    found = mismatch(witnessed({0: long, 1: [[B, A, C], *long[1:]], 2: long, 3: long}), strict=False)
    assert found is not None and found.rank == 1 and "earlier calls differ" in found.message


def test_a_busy_rank_has_ten_times_its_limit_and_a_stopped_or_silent_one_none() -> None:
    waits = witnessed({0: WELL, 1: WELL, 2: WELL}, waiting=(0, 1, 2))
    at_work = witnessed({3: steps_of(A, B)})[0]
    assert judge([*waits, replace(at_work, quiet_s=30, busy=True)]) is None
    for changes, error in (({"quiet_s": 101.0, "busy": True}, "Silent"), ({"quiet_s": 11.0}, "Silent"),
                           ({"manner": "stopped"}, "Stopped")):
        found = judge([*waits, replace(at_work, **changes)])
        assert found is not None and (found.rank, found.error) == (3, error)
    assert judge([*waits, replace(at_work, quiet_s=9)]) is None


def test_a_host_that_does_not_answer_is_named() -> None:
    found = judge(witnessed({0: WELL, 1: WELL}, waiting=(0, 1)), unheard=[2, 3], host="node7")
    assert found is not None and (found.rank, found.error) == (2, "HostSilent") and "node7" in found.message


def test_a_message_that_was_never_sent_names_the_sender() -> None:
    receiver = Call(4, "recv", "pp_forward 0,1", 64, 5.0, 5.0, 0.0, 3, "p2p.py:1", 0, 0, "rf0")
    sender = [Call(n, "send", "pp_forward 0,1", 64, float(n), 0.0, 1.0, 3, "p2p.py:2", 0, 1, "sf0") for n in (1, 2, 3)]
    elsewhere = Call(9, "all_reduce", "dp 0,2", 64, 6.0, 6.0, 0.0, 3, "zero.py:1", 7, -1, "B0")
    told = [Told(1, "waiting", 99, False, 10, 3, "step", "rf0", receiver, (receiver,)),
            Told(0, "waiting", 99, False, 10, 3, "step", "B0", elsewhere, (*sender, elsewhere))]
    found = judge(told)
    assert found is not None and found.rank == 0 and "recv from rank 0" in found.message
    told[1] = replace(told[1], calls=(*sender, replace(sender[-1], sequence=4), elsewhere))
    found = judge(told)  # then rank 0 waits for rank 2, of whom nothing is known, and rank 1's message is under way
    assert found is None or found.error == "Stuck"


def test_ranks_are_written_briefly_and_read_back() -> None:
    for ranks in ((0, 1), (3,), (0, 2, 4, 6), (5, 6, 7), (0, 3, 4), tuple(range(0, 2128, 8))):
        assert parse_ranks(format_ranks(ranks)) == ranks
    assert format_ranks(range(0, 2128, 8)) == "0-2120:8"


def test_a_recorder_keeps_the_newest_calls_and_who_made_them() -> None:
    recorder = Recorder()
    recorder.note(step=4, phase="step", action="F12")
    group = recorder.group("tp", (0, 1))
    for _ in range(700):
        recorder.end(recorder.begin(group, "all_reduce", 64))
    number = recorder.begin(group, "all_gather", 128)
    recorder.wait(number)
    words = LastWords.read(recorder.fd)
    assert len(words.calls) == 512 and words.begun == 701 and words.call == words.calls[-1]
    call = words.calls[-1]
    assert (call.operation, call.sequence, call.group) == ("all_gather", 701, "tp 0,1")
    assert (call.step, call.action) == (4, "F12")
    assert "test_verdict.py" in call.site and call.waited and not call.ended and recorder.waiting
    recorder.end(number)
    assert not recorder.waiting and recorder.waited_s > 0 and LastWords.read(recorder.fd).waiting == -1
    assert list(recorder.waits) == ["tp"]
    other = recorder.begin(recorder.group("dp", (0, 2)), "all_reduce", 8)
    recorder.wait(other)
    recorder.end(other)
    assert list(recorder.waits) == ["tp", "dp"] and sum(recorder.waits.values()) == recorder.waited_s


def test_the_main_threads_stack_is_read_from_a_dump() -> None:
    text = ('Thread 0x01 (most recent call first):\n  File "/x/watch.py", line 3 in loop\n\nCurrent thread 0x02 (most '
            'recent call first):\n  File "/a/b.py", line 12 in wait\n  File "/a/c.py", line 7 in <module>\n')
    assert main_stack(text) == ("/a/b.py:12 in wait", "/a/c.py:7 in <module>")


def test_who_waits_for_a_rank_that_waits_for_a_busy_one_accuses_nobody() -> None:
    """Rank 3 is ahead, in its dp group's third call; rank 1 is still in the first, for which busy rank 0 is late."""
    before = [list(PROGRAM)]
    told = witnessed({0: before, 1: [*before, [A]], 2: [*before, [A, B, C]], 3: [*before, [A, B, C]]}, (1, 2, 3))
    ahead = [replace(one, quiet_s=5.0, waiting=one.waiting and replace(one.waiting, waited=-float(one.rank)))
             for one in told]
    assert judge(ahead) is None
    gone = [replace(one, manner="gone") if one.rank == 0 else one for one in ahead]
    found = judge(gone)
    assert found is not None and found.error == "Mismatch"
