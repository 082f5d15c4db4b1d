"""What rank 0 tells: a full disk, or a reader that has gone, is no reason to lose a run."""

from __future__ import annotations

import fcntl
import os
import pty
import resource
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from hpcpar.config.load import to_toml
from hpcpar.config.run_folder import RunFolder, read_lines
from hpcpar.submit.status import read_status
from hpcpar.train.state import Progress
from tests.train.small import make_job, make_store
from tests.train.test_saving import figures, run_of, train


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metrics")
    (folder / "job.toml").write_text(to_toml(make_job(make_store(folder), train={"precision": "fp32"})))
    return folder


def command(place: Path, run: str) -> list[str]:
    return [sys.executable, "-m", "hpcpar.cli", "train", str(place / "job.toml"), "--run", str(place / run)]


def test_lines_that_a_full_disk_does_not_take_are_not_lost(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(place / "store", train={"steps": 10}, data={"validate_every": 0}, checkpoint={"every": 0})
    folder = RunFolder(place / "full")
    folder.create()
    run, _ = run_of(job, folder)
    unlimited, seen = resource.RLIM_INFINITY, []

    def note(step: int = 0, phase: str = "") -> None:
        seen.append(len(figures(folder, "loss")))
        if step == 4:  # a part of the next line fits
            resource.prlimit(os.getpid(), resource.RLIMIT_FSIZE, (folder.metrics.stat().st_size + 50, unlimited))
        if step == 8:
            resource.prlimit(os.getpid(), resource.RLIMIT_FSIZE, (unlimited, unlimited))

    try:
        assert train(run, note)
    finally:
        resource.prlimit(os.getpid(), resource.RLIMIT_FSIZE, (unlimited, unlimited))
    assert max(seen[:7]) <= 3 and sorted(figures(folder, "loss")) == list(range(1, 11))
    assert [line["step"] for line in read_lines(folder.metrics) if "loss" in line] == list(range(1, 11))
    said = [line for line in capsys.readouterr().out.splitlines() if "wait in memory" in line]
    assert said == [f"{folder.metrics}: File too large; its lines wait in memory, training goes on"]


@pytest.mark.parametrize("room_at_last", [True, False])
def test_the_end_writes_what_still_waits_or_says_what_is_lost(place: Path, capsys: pytest.CaptureFixture[str],
                                                              room_at_last: bool) -> None:
    job = make_job(place / "store", train={"steps": 4}, data={"validate_every": 0}, checkpoint={"every": 0})
    folder = RunFolder(place / f"end-{room_at_last}")
    folder.create()
    run, _ = run_of(job, folder)
    unlimited = resource.RLIM_INFINITY

    def note(step: int = 0, phase: str = "") -> None:
        if step == 2:
            resource.prlimit(os.getpid(), resource.RLIMIT_FSIZE, (folder.metrics.stat().st_size, unlimited))

    def lift(progress: Progress) -> None:  # in place of the last save, which would write a line
        if room_at_last:
            resource.prlimit(os.getpid(), resource.RLIMIT_FSIZE, (unlimited, unlimited))

    run.saves.last = lift  # type: ignore[method-assign]
    try:
        assert train(run, note)
    finally:
        resource.prlimit(os.getpid(), resource.RLIMIT_FSIZE, (unlimited, unlimited))
    lost = f"{folder.metrics}: 4 lines are lost: the disk is still full"
    assert (lost in capsys.readouterr().out) == (not room_at_last)
    assert sorted(figures(folder, "loss")) == ([1, 2, 3, 4] if room_at_last else [1])


def test_a_journal_that_cannot_be_written_at_the_end(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(place / "store", train={"steps": 2}, data={"validate_every": 0})
    folder = RunFolder(place / "journal")
    folder.create()
    run, _ = run_of(job, folder)

    def note(step: int = 0, phase: str = "") -> None:
        if phase == "finish":
            folder.journal.unlink()
            folder.journal.mkdir()

    assert train(run, note)
    assert f"{folder.journal}: Is a directory; it does not say how this start ended" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_under_stdout(place: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command(place, "stdout"), stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "") and read_status(place / "stdout").state == "done"


def test_a_reader_that_has_seen_enough(place: Path) -> None:
    run = subprocess.Popen(command(place, "head"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stderr is not None
    run.stdout.readline()
    run.stdout.close()
    assert (run.wait(100), run.stderr.read()) == (0, "")
    run.stderr.close()
    assert read_status(place / "head").state == "done"


def test_the_live_line_fits_the_terminal(place: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    run = subprocess.Popen(command(place, "tty"), stdout=theirs)
    os.close(theirs)
    said = b""
    while True:
        try:
            said += os.read(ours, 1 << 16)
        except OSError:  # nobody is at the other end any more
            break
    assert run.wait(60) == 0
    os.close(ours)
    lines = [piece for piece in said.decode().split("\r\x1b[K") if piece.startswith("step ") and "[" in piece]
    assert len(lines) >= 6 and all(len(line.rstrip("\r\n")) <= 39 for line in lines), lines
