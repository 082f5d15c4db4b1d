"""The pieces of the watch that one process can show."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcpar.comm.control import Alone
from hpcpar.comm.failure import Failure, appeared, publish_once
from hpcpar.comm.inquiry import Charge
from hpcpar.comm.recorder import DONE, FAILED, LastWords, Recorder
from hpcpar.comm.watch import Watch, put_away
from hpcpar.comm.witness import Deaths, Task, Witness, manner, process_state
from hpcpar.config.run_folder import RunFolder
from hpcpar.errors import UserError
from hpcpar.layout.mesh import Mesh


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def start(run: RunFolder) -> Watch:
    return Watch.start(run, Alone(), "here", Mesh(), abort=pytest.fail)


def test_a_status_is_read_back_through_its_file() -> None:
    status = Recorder()
    assert LastWords.read(status.fd).step is None
    status.note(step=3, phase="forward", action="all_reduce tp")
    status.note(step=4)
    status.note(action="p2p")
    words = LastWords.read(status.fd)
    assert (words.step, words.phase, words.action, words.fault) == (4, "forward", "p2p", ())
    status.mark(DONE)
    assert LastWords.read(status.fd).state == DONE


def test_a_long_note_is_cut_and_harms_nothing() -> None:
    status = Recorder()
    status.note(step=1, phase="p" * 1000, action="é" * 1000)
    os.write(status.fd, b"Fatal Python error: Aborted\n\nStack\n")
    words = LastWords.read(status.fd)
    assert (words.state, words.step, set(words.phase)) == (b"r", 1, {"p"})
    assert words.fault[0] == "Fatal Python error: Aborted"
    status.mark(FAILED)
    assert LastWords.read(status.fd).phase == words.phase


def test_only_the_first_publishes(tmp_path: Path) -> None:
    path = tmp_path / "failure.json"
    assert not appeared(path)
    assert publish_once(path, "one")
    assert not publish_once(path, "two")
    assert appeared(path)
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_earlier_failures_are_kept_in_order(run: RunFolder) -> None:
    for text in ("first", "second"):
        run.failure.write_text(text)
        put_away(run)
    assert [(run.path / f"failure-{n}.json").read_text() for n in (1, 2)] == ["first", "second"]


def test_alone_an_error_is_told_and_ends_with_code_3(run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, start(run) as watch:
        watch.note(step=5, phase="save", action="write shard")
        raise ValueError("torn")
    assert end.value.code == 3
    failure = json.loads(run.failure.read_text())
    known = Failure(**{**failure, "traceback": tuple(failure["traceback"])})
    assert capfd.readouterr().err == known.block(run)
    assert (known.step, known.phase, known.action, known.message) == (5, "save", "write shard", "torn")


def test_alone_a_users_mistake_is_one_line(run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, start(run):
        raise UserError("layout.tp", "must divide heads", "try 4")
    assert end.value.code == 2
    assert capfd.readouterr().err == "hpcpar: layout.tp: must divide heads; try 4\n"
    assert not run.failure.exists()


@pytest.mark.parametrize("code", [None, 0, 75])
def test_a_clean_stop_is_no_failure(code: int | None, run: RunFolder) -> None:
    with pytest.raises(SystemExit) as end, start(run):
        raise SystemExit(code)
    assert end.value.code == code
    assert not run.failure.exists()


def test_an_unwritable_run_folder_does_not_silence_the_error(run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    watch = start(run)
    shutil.rmtree(run.path)
    with pytest.raises(SystemExit):
        watch.failed(OSError("No space left on device"))
    assert "OSError: No space left on device" in capfd.readouterr().err


def test_what_is_said_has_been_read_when_the_job_is_ended() -> None:
    code = ("import os; from hpcpar.comm.failure import _unread, say; os.write(1, b'.'); say('why it ended\\n'); "
            "os.write(1, str(_unread(2)).encode())")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as speaker:
        assert speaker.stdout and speaker.stderr
        assert speaker.stdout.read(1) == b"."
        time.sleep(0.2)  # a launcher that is slow to read
        assert os.read(speaker.stderr.fileno(), 100) == b"why it ended\n"
        assert speaker.stdout.read() == b"0"


def test_deaths_come_in_order_and_the_living_can_be_killed() -> None:
    code = "import os, sys; r, w = os.pipe(); print(r, flush=True); sys.stdin.read()"
    ranks = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
             for _ in range(4)]
    lines = [int(rank.stdout.readline()) for rank in ranks if rank.stdout]
    deaths = Deaths(tuple(Charge(i, rank.pid, -1, lines[i], {}) for i, rank in enumerate(ranks)))
    for index in (2, 0):
        ranks[index].send_signal(signal.SIGKILL)
        ranks[index].wait()
    assert [charge.rank for charge in deaths.wait(5)] == [2, 0]
    deaths.kill()
    assert {rank.wait() for rank in ranks} == {-signal.SIGKILL}
    for rank in ranks:
        for pipe in (rank.stdin, rank.stdout):
            assert pipe is not None
            pipe.close()


def test_a_rank_that_is_gone_before_it_is_watched_counts_as_dead() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert process_state(process.pid) == (False, None)
    assert [charge.rank for charge in Deaths((Charge(1, process.pid, 3, 4, {}),)).wait(0)] == [1]


def test_how_it_ended_is_said_as_far_as_known() -> None:
    assert manner(LastWords(), signal.SIGKILL, False) == "of SIGKILL"
    assert manner(LastWords(), 7 << 8, False).startswith("with exit code 7")
    assert "without a word" in manner(LastWords(), None, False)
    assert "lack of memory" in manner(LastWords(), signal.SIGKILL, True)
    assert manner(LastWords(fault=("Fatal Python error: Aborted",)), None, False) == "Fatal Python error: Aborted"


def test_a_task_survives_the_way_to_the_witness() -> None:
    task = Task("/run", "here", 2, (Charge(0, 10, 3, 4, {"tp": 0}), Charge(1, 11, 3, 4, {"tp": 1})),
                {"step": 3.0}, {"here": [0, 1]}, (1, 1, 1, 2), ("-m", "heir"))
    assert Task.read(task.text()) == task


def test_before_a_witness_ends_the_ranks_it_has_a_lost_launcher_seen_to(run: RunFolder, tmp_path: Path) -> None:
    """The launcher does not end the rank of a failed run: the command finds it alive, then it is killed."""
    run.watch.mkdir()
    code = "import os, time; r, w = os.pipe(); print(r, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as rank:
        assert rank.stdout is not None
        line = int(rank.stdout.readline())
        asks = f"import os, pathlib; pathlib.Path({str(tmp_path / 'found')!r}).write_text(str(os.kill({rank.pid}, 0)))"
        run.failure.write_text("{}")
        Witness(Task(str(run.path), "there", 2, (Charge(1, rank.pid, -1, line, {}),), {"step": 60.0},
                     {"here": [0], "there": [1]}, (1, 2, 1, 1), ("-c", asks))).watch()
        assert rank.wait() == -signal.SIGKILL
    assert (tmp_path / "found").read_text() == "None"
