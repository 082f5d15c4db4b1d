"""A dead rank ends the job, with one root cause: real ranks under mpirun, each test kills them its own way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("looping_ranks.py")
ROOT = Path(__file__).parents[2]
HEAD = "ROOT CAUSE OF THE FAILED RUN"
LIMIT_S = 30

pytestmark = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")


def launch(fate: str, run: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run four ranks to their end; fails when it takes longer than 30 s or leaves a process behind."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runpy; runpy.run_path({str(SCRIPT)!r})"
    command = ["mpirun", "-n", "4", sys.executable, "-c", code, fate, str(run), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    time.sleep(0.2)  # the witness outlives the launcher by a moment
    assert living(str(run)) == []
    return done


def living(mark: str) -> list[str]:
    """Return the ranks and witnesses alive: the run folder is in their command lines."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if mark in words:
            found.append(" ".join(words))
    return found


def check_root_cause(done: subprocess.CompletedProcess[str], run: Path, rank: int = 2) -> dict[str, Any]:
    """Check what every failure has in common; return failure.json."""
    failure: dict[str, Any] = json.loads((run / "failure.json").read_text())
    assert done.returncode != 0
    assert done.stderr.count(HEAD) == 1, done.stderr
    assert done.stdout.count(HEAD) == 0
    assert (failure["rank"], failure["step"], failure["phase"]) == (rank, 17, "forward")
    assert failure["coordinates"] == {"pp": rank // 2, "dp": 0, "cp": 0, "tp": rank % 2}
    assert failure["action"] == "all_reduce world 8 KiB"
    block = done.stderr.partition(HEAD)[2]
    for said in (f"{rank} of 4 on host {failure['host']}", f"(pp {rank // 2} dp 0 cp 0 tp {rank % 2})", "step 17",
                 "phase forward", f"{failure['error']}: {failure['message']}", "3 other ranks", failure["log"]):
        assert said in block, (said, block)
    return failure


@pytest.mark.parametrize("fate", ["raise", "raise-late"])
def test_an_exception_ends_the_job_with_code_3(fate: str, tmp_path: Path) -> None:
    done = launch(fate, tmp_path / "run")
    failure = check_root_cause(done, tmp_path / "run")
    assert done.returncode == 3
    assert (failure["error"], failure["message"]) == ("ValueError", "a bad number")
    assert any("in meet" in line for line in failure["traceback"])
    assert "ValueError: a bad number" in (tmp_path / "run" / "logs" / "rank-00002.log").read_text()


@pytest.mark.parametrize(("fate", "says"), [("exit", "exit"), ("kill", "kill"), ("segfault", "Segmentation fault")])
def test_a_death_without_a_word_is_told_by_the_witness(fate: str, says: str, tmp_path: Path) -> None:
    failure = check_root_cause(launch(fate, tmp_path / "run"), tmp_path / "run")
    assert failure["error"] == "Died"
    assert says in failure["message"].replace("SIGKILL", "kill")
    assert bool(failure["traceback"]) == (fate == "segfault")


def test_leaving_early_is_a_failure(tmp_path: Path) -> None:
    done = launch("leave", tmp_path / "run")
    assert check_root_cause(done, tmp_path / "run")["error"] == "SystemExit"


def test_of_two_errors_at_once_one_is_the_root_cause(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = launch("two-raise", run)
    rank = json.loads((run / "failure.json").read_text())["rank"]
    check_root_cause(done, run, rank)
    assert rank in (1, 2)
    assert "ValueError: a bad number" in (run / "logs" / f"rank-{3 - rank:05d}.log").read_text()


def test_a_death_on_one_of_two_hosts_is_told_once(tmp_path: Path) -> None:
    failure = check_root_cause(launch("kill", tmp_path / "run", "--two-hosts"), tmp_path / "run")
    assert failure["host"] == "host-1"


def test_a_lost_launcher_is_asked_for_on_other_hosts_than_its_own(tmp_path: Path) -> None:
    """Before the job is ended: by the rank that failed, and where that takes long by its witness."""
    check_root_cause(launch("raise", tmp_path / "one"), tmp_path / "one")
    check_root_cause(launch("raise", tmp_path / "two", "--two-hosts"), tmp_path / "two")
    assert not (tmp_path / "one/orphaned").exists()
    assert (tmp_path / "two/orphaned").read_text().startswith("asked on host-1\n")
    assert "host-0" not in (tmp_path / "two/orphaned").read_text()


def test_a_users_mistake_is_one_line_and_code_2(tmp_path: Path) -> None:
    done = launch("mistake", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.count("data.store: no such folder") == 1
    assert HEAD not in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "failure.json").exists()


def test_a_clean_run_leaves_nothing_and_keeps_an_earlier_failure(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "failure.json").write_text("{}")
    done = launch("none", run)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in run.iterdir()) == ["failure-1.json", "logs"]
