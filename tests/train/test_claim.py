"""One run at a time in a folder; what a killed run left is no obstacle."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hpcpar import cli
from hpcpar.checkpoint.verify import published_sets, verify_set
from hpcpar.config.load import to_toml
from hpcpar.config.run_folder import RunFolder, read_lines
from hpcpar.config.surroundings import process_table
from hpcpar.errors import UserError
from hpcpar.train.claim import claimed, refuse_if_running
from tests.train.small import make_job, make_store

LOOK_S = 0.02
# of a container with this host's name, say: what its number means, nobody here knows
THERE = json.dumps({"host": "there", "pid": os.getpid(), "began": 1, "table": "of another boot"})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    found = RunFolder(tmp_path / "a run")
    found.create()
    found.watch.mkdir()
    return found


def claim_of(process: subprocess.Popen[bytes], folder: RunFolder) -> None:
    """Have a process hold a folder, as far as others can see."""
    began = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
    folder.running.write_text(json.dumps({"host": "here", "pid": process.pid, "began": began,
                                          "table": process_table()}))


def test_a_folder_is_held_and_given_back(folder: RunFolder) -> None:
    with claimed(folder, "here"):
        assert json.loads(folder.running.read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=rf"another run is at work in it: process {os.getpid()} on here; .*'.*a run/"
                                            r"STOP'"), claimed(folder, "here"):
            pass
        assert folder.running.exists()
    assert not folder.running.exists()
    with pytest.raises(ZeroDivisionError), claimed(folder, "here"):
        raise ZeroDivisionError
    assert not folder.running.exists()


def test_a_process_that_has_ended_holds_nothing(folder: RunFolder) -> None:
    process = subprocess.Popen(["sleep", "100"])
    claim_of(process, folder)
    with pytest.raises(UserError, match="another run"):
        refuse_if_running(folder)
    process.kill()
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    refuse_if_running(folder)  # nobody has asked for its exit code yet
    process.wait()
    with claimed(folder, "here"):
        assert json.loads(folder.running.read_text())["pid"] == os.getpid()


def test_a_number_that_came_again_holds_nothing(folder: RunFolder) -> None:
    folder.running.write_text(json.dumps({"host": "here", "pid": os.getpid(), "began": 1, "table": process_table()}))
    with claimed(folder, "here"):
        pass


@pytest.mark.parametrize("text", ["", "torn {", "[]", '{"host": "here"}'])
def test_a_damaged_claim_holds_nothing(folder: RunFolder, text: str) -> None:
    folder.running.write_text(text)
    with claimed(folder, "here"):
        pass


def test_a_run_on_another_host_shows_by_what_it_writes(folder: RunFolder) -> None:
    folder.running.write_text(THERE)
    beat, stop = folder.watch / "beat-there", threading.Event()

    def live() -> None:
        while not stop.wait(LOOK_S):
            beat.write_text("{}")

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(UserError, match=f"process {os.getpid()} on there"):
            refuse_if_running(folder, LOOK_S)
    finally:
        stop.set()
        thread.join()
    with claimed(folder, "here", LOOK_S):  # silent by now
        assert json.loads(folder.running.read_text())["host"] == "here"


def test_a_run_elsewhere_that_writes_nothing_else_shows_by_its_claim(folder: RunFolder,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    with claimed(folder, "there", LOOK_S / 10):  # one process in a step that takes an hour: no metrics, no witness
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr("hpcpar.train.claim.process_table", lambda: "of another boot")
            with pytest.raises(UserError, match=r"another run is at work in it: process .* on there"):
                refuse_if_running(folder, LOOK_S)
        assert not folder.metrics.exists() and not list(folder.watch.iterdir())
        folder.running.unlink()  # by hand: neither the beats nor the end make it anew
        time.sleep(3 * LOOK_S)
    assert not folder.running.exists() and not any(thread.name == "claim" for thread in threading.enumerate())


def test_a_claim_that_another_start_took_is_not_touched(folder: RunFolder) -> None:
    with claimed(folder, "here", LOOK_S):
        folder.running.write_text(THERE)
        time.sleep(3 * LOOK_S)  # a beat that was under way is over
        written = folder.running.stat().st_mtime_ns
        time.sleep(3 * LOOK_S)
        assert folder.running.stat().st_mtime_ns == written
    assert folder.running.read_text() == THERE


STARTER = """
import sys, time
from pathlib import Path
from hpcpar.config.run_folder import RunFolder
from hpcpar.errors import UserError
from hpcpar.train.claim import claimed
sys.stdin.readline()
time.sleep(float(sys.argv[2]))
try:
    with claimed(RunFolder(Path(sys.argv[1])), "here", 0.1):
        print("held", flush=True)
        sys.stdin.readline()
except UserError:
    print("refused", flush=True)
"""


def test_of_starts_that_wait_for_the_same_dead_run_one_gets_the_folder(folder: RunFolder) -> None:
    folder.running.write_text(THERE)
    starters = [subprocess.Popen([sys.executable, "-c", STARTER, str(folder.path), str(0.05 * number)], text=True,
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE) for number in range(4)]
    try:
        for starter in starters:
            assert starter.stdin is not None
            starter.stdin.write("go\n")
            starter.stdin.flush()
        said = [starter.stdout.readline().strip() for starter in starters if starter.stdout is not None]
    finally:
        for starter in starters:
            starter.communicate("end\n", timeout=60)
    assert sorted(said) == ["held", "refused", "refused", "refused"]
    assert not list(folder.path.glob(".RUNNING*")) and not folder.running.exists()


def test_a_run_elsewhere_that_ends_meanwhile_gives_the_folder(folder: RunFolder) -> None:
    folder.running.write_text(THERE)
    stop = threading.Event()

    def live() -> None:
        for _ in range(10):
            (folder.watch / "beat-there").write_text("{}")
            time.sleep(LOOK_S)
        folder.running.unlink()
        while not stop.wait(LOOK_S / 4):  # the witness of the run that comes next
            (folder.watch / "beat-there").write_text("{}")

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with claimed(folder, "here", LOOK_S):
            assert json.loads(folder.running.read_text())["host"] == "here"
    finally:
        stop.set()
        thread.join()


def test_a_claim_that_cannot_be_read_is_not_taken_away(folder: RunFolder) -> None:
    folder.running.mkdir()
    with pytest.raises(IsADirectoryError), claimed(folder, "here"):
        pass


def test_file_systems_without_hard_links_and_nfs_that_repeats_them(folder: RunFolder,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def repeat(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    for broken in (refuse, repeat):
        monkeypatch.setattr(os, "link", broken)
        with claimed(folder, "here"):
            with pytest.raises(UserError, match="another run"), claimed(folder, "here"):
                pass
            assert json.loads(folder.running.read_text())["pid"] == os.getpid()
        assert not folder.running.exists()


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    job = make_job(make_store(tmp_path), train={"steps": 100000}, data={"validate_every": 0}, checkpoint={"every": 5})
    (tmp_path / "job.toml").write_text(to_toml(job))
    run = RunFolder(tmp_path / "run")
    command = [sys.executable, "-m", "hpcpar.cli", "train", str(tmp_path / "job.toml"), "--run", str(run.path)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not published_sets(run.checkpoints):
            assert first.poll() is None
            time.sleep(0.05)
        for more in ([], ["--allow-fresh"], ["--rewind-to", "5"]):
            second = subprocess.run([*command, *more], capture_output=True, text=True, timeout=100)
            assert second.returncode == 2 and second.stdout == ""
            assert f"{run.path}: another run is at work in it: process {first.pid} on " in second.stderr
        assert cli.main(["ckpt", "rewind", str(run.path), "step-00000005"]) == 2
        run.stop.touch()
        assert first.wait(60) == 75
    finally:
        first.kill()
    assert not run.running.exists() and [line["event"] for line in read_lines(run.journal)] == ["start", "stopped"]
    assert all(verify_set(path) for path in published_sets(run.checkpoints))
    assert cli.main(["train", str(tmp_path / "job.toml"), "--run", str(run.path), "--train.steps", "1"]) == 0
