"""Who hangs, and whose collectives collide: real ranks under mpirun that talk through torch.distributed.

`make chaos` runs all fates; the default suite a sample, as every run costs some seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hpcpar import cli
from tests.chaos.test_failures import HEAD, ROOT, living

SCRIPT = Path(__file__).with_name("colliding_ranks.py")
ALL = "HPCPAR_CHAOS" in os.environ
LINES = {text: number for number, text in enumerate(SCRIPT.read_text().splitlines(), 1)}
FIRST, SECOND, THIRD = (next(n for text, n in LINES.items() if text.startswith(start)) for start in (
    "    dist.all_reduce(torch.ones(size)", "    gather_flat(", "    dist.all_reduce(torch.ones(10)"))

pytestmark = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")


def launch(fate: str, run: Path, *options: str) -> subprocess.Popen[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runpy; runpy.run_path({str(SCRIPT)!r})"
    command = ["mpirun", "-n", "4", sys.executable, "-c", code, fate, str(run), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def verdict(process: subprocess.Popen[str], run: Path) -> dict[str, Any]:
    """Wait for the end of a run that hangs; check what every verdict has in common; return failure.json."""
    _, error = process.communicate(timeout=60)
    time.sleep(0.2)
    assert process.returncode != 0
    assert living(str(run)) == []
    assert error.count(HEAD) == 1, error
    failure: dict[str, Any] = json.loads((run / "failure.json").read_text())
    assert failure["rank"] == 3 and failure["coordinates"] == {"pp": 0, "dp": 1, "cp": 0, "tp": 1}
    assert failure["message"] in error and failure["call"] in error
    return failure


MISMATCHES = {
    "skip": (["skipped a collective", "all_gather of 12000 bytes, call 36 of group tp (ranks 2,3)", "in step 17",
              f"colliding_ranks.py:{SECOND} in second"], True),
    "swap": (["misordered collectives", "call 35 of group tp (ranks 2,3)", f"colliding_ranks.py:{FIRST} in first",
              f"colliding_ranks.py:{SECOND} in second"], ALL),
    "shape": (["mis-shaped collective, 4004 bytes where the others have 4000", "call 35 of group tp",
               f"colliding_ranks.py:{FIRST} in first"], True),
    "skip-last": (["skipped a collective of step 17", "call 18 of group dp (ranks 1,3)",
                   f"colliding_ranks.py:{THIRD} in third"], ALL),
}


@pytest.mark.parametrize("fate", [fate for fate, (_, wanted) in MISMATCHES.items() if wanted])
def test_a_wrong_collective_is_named(fate: str, tmp_path: Path) -> None:
    """On two pretended hosts, whose witnesses find it out together."""
    failure = verdict(launch(fate, tmp_path / "run", "--two-hosts"), tmp_path / "run")
    assert failure["error"] == "Mismatch" and failure["host"] == "host-1"
    for words in MISMATCHES[fate][0]:
        assert words in failure["message"], (words, failure["message"])


HANGS = {"stop": ("Stopped", "SIGSTOP"), **({"sleep": ("Silent", "in phase step")} if ALL else {})}


@pytest.mark.parametrize("fate", HANGS)
def test_a_rank_without_a_sign_of_life_is_named(fate: str, tmp_path: Path) -> None:
    failure = verdict(launch(fate, tmp_path / "run"), tmp_path / "run")
    error, says = HANGS[fate]
    assert failure["error"] == error and says in failure["message"]
    assert (failure["step"], failure["phase"], failure["action"]) == (17, "step", "F1")
    assert f"colliding_ranks.py:{THIRD}" in failure["call"]
    assert fate == "stop" or "in meet" in failure["traceback"][0]  # where it sleeps


def test_a_busy_rank_survives_three_times_its_limit_and_stacks_show_it(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    process = launch("busy", run)
    beats = run / "logs" / "watch"
    while not any(row[:2] == [0, 17] for beat in beats.glob("beat-*") for row in json.loads(beat.read_text())["ranks"]):
        assert process.poll() is None
        time.sleep(0.1)
    assert cli.main(["stacks", str(run)]) == 0
    alone, _, others = capsys.readouterr().out.partition("\n\n")
    assert alone.startswith("1 rank (0)") and "step 17, step, F1, working" in alone and "in meet" in alone
    assert others.count("waiting") >= 1 and "in all_reduce" in others
    _, error = process.communicate(timeout=60)
    assert error == ""
    assert process.returncode == 0
    assert not (run / "failure.json").exists()


@pytest.mark.skipif(not ALL, reason="takes long; part of make chaos")
def test_a_host_that_falls_silent_is_named(tmp_path: Path) -> None:
    """As a node without power looks to the others: its witness and its ranks do nothing any more."""
    run = tmp_path / "run"
    process = launch("none", run, "--two-hosts", "--long")
    while not (run / "logs" / "watch" / "beat-host-1").exists():
        time.sleep(0.1)
    hosts = [int(p.name) for p in Path("/proc").glob("[0-9]*") if (p / "cmdline").exists()
             and str(run) in (words := (p / "cmdline").read_bytes().decode().split("\0"))
             and ("hpcpar.comm.witness" in words or rank_of(p) in ("2", "3"))]
    witnesses = [pid for pid in hosts if b"hpcpar.comm.witness" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    of_host_1 = [pid for pid in witnesses if rank_of(Path(f"/proc/{pid}")) == "2"]
    start = time.monotonic()
    for pid in {*of_host_1, *(set(hosts) - set(witnesses))}:
        os.kill(pid, signal.SIGSTOP)
    try:
        _, error = process.communicate(timeout=60)
    finally:
        for pid in hosts:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
    failure = json.loads((run / "failure.json").read_text())
    assert failure["error"] == "HostSilent" and failure["host"] == "host-1" and failure["rank"] == 2
    assert time.monotonic() - start < 30 and error.count(HEAD) == 1


def rank_of(process: Path) -> str:
    words = (process / "environ").read_bytes().decode(errors="replace").split("\0")
    return next((word.partition("=")[2] for word in words if word.startswith("PMI_RANK=")), "")
