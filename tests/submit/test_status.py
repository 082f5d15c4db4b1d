"""`hpcpar status` from made-up run folders: every state, and the figures."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hpcpar import cli
from hpcpar.config.job import Job
from hpcpar.config.load import override, to_toml
from hpcpar.config.resolve import resolve
from hpcpar.config.run_folder import RunFolder
from hpcpar.config.surroundings import process_table
from hpcpar.errors import UserError
from hpcpar.submit.status import describe, model_flops_utilization, read_status

NOW = 1_000_000.0


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    found = RunFolder(tmp_path / "run")
    found.create()
    found.config.write_text(to_toml(override(Job(), train={"steps": 100})))
    return found


def write(path: Path, *lines: dict[str, Any], age_s: float = 1.0) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(path, (NOW - age_s, NOW - age_s))


def started(ago_s: float, **more: Any) -> dict[str, Any]:
    return {"event": "start", "time": NOW - ago_s, "step": 0, "ranks": 8, "host": "elsewhere", "pid": 1, **more}


STEPS = [{"step": n, "loss": 5.0 - n / 100, "step_s": 2.0, "tokens_per_s": 4096.0} for n in range(1, 41)]


def test_a_running_one(folder: RunFolder) -> None:
    write(folder.journal, started(400), started(100, step=20))
    write(folder.metrics, *STEPS, {"step": 40, "val_loss": 4.7},
          {"step": 40, "slow_rank": 5, "host": "node3", "ratio": 1.11})
    for name in ("step-00000020", "step-00000040", ".step-00000060.tmp", "step-00000060"):
        (folder.checkpoints / name).mkdir()
    for name in ("step-00000020", "step-00000040"):
        (folder.checkpoints / name / "manifest.json").write_text("{}")
    found = read_status(folder.path, NOW)
    assert (found.state, found.step, found.steps, found.loss, found.restarts) == ("running", 40, 100, 4.6, 1)
    assert found.last_set == "step-00000040" and found.val_loss == 4.7
    assert found.left_s == 120.0 and found.goodput == pytest.approx(80 / 400)
    text = describe(found)
    for said in ("running", "40 of 100", "4.10K tokens/s", "2m00s", "20.0%", "node3", str(folder.logs)):
        assert said in text, text


@pytest.mark.parametrize("event", ["done", "stopped"])
def test_a_clean_end(folder: RunFolder, event: str) -> None:
    write(folder.journal, started(400), {"event": event, "time": NOW - 300, "step": 40}, age_s=300)
    write(folder.metrics, *STEPS, age_s=300)
    found = read_status(folder.path, NOW)
    assert (found.state, found.left_s) == (event, None) and found.goodput == pytest.approx(0.8)


def test_a_failed_one_says_who(folder: RunFolder) -> None:
    write(folder.journal, started(400))
    failure = {"rank": 3, "host": "node9", "step": 7, "error": "Died", "message": "of SIGKILL"}
    folder.failure.write_text(json.dumps(failure))
    found = read_status(folder.path, NOW)
    assert found.state == "failed" and "rank 3 on node9, step 7: Died: of SIGKILL" in describe(found)


def test_silence_without_a_word_is_death_unless_the_process_is_here(folder: RunFolder) -> None:
    write(folder.journal, started(4000), age_s=4000)
    write(folder.metrics, *STEPS, age_s=3900)
    assert read_status(folder.path, NOW).state == "dead"
    folder.watch.mkdir()
    write(folder.watch / "beat-node1", {"count": 3}, age_s=3)
    assert read_status(folder.path, NOW).state == "running"
    (folder.watch / "beat-node1").unlink()
    write(folder.journal, started(4000, table=process_table(), pid=os.getpid()), age_s=4000)
    assert read_status(folder.path, NOW).state == "running"


def test_a_process_that_is_not_here_any_more_is_dead_at_once(folder: RunFolder) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    write(folder.journal, started(40, table=process_table(), pid=gone.pid), age_s=40)
    write(folder.metrics, *STEPS, age_s=1)
    assert read_status(folder.path, NOW).state == "dead"
    write(folder.journal, started(40, host="elsewhere", pid=gone.pid), age_s=40)
    assert read_status(folder.path, NOW).state == "running"


def test_only_published_sets_count(folder: RunFolder) -> None:
    for name in ("step-00000015", "step-00000020.aside", "step-100000000", ".step-00000030.tmp"):
        (folder.checkpoints / name).mkdir()
        (folder.checkpoints / name / "manifest.json").write_text("{}")
    assert read_status(folder.path, NOW).last_set == "step-100000000"
    (folder.checkpoints / "step-100000000").rename(folder.checkpoints / "step-100000000.aside")
    assert read_status(folder.path, NOW).last_set == "step-00000015"


def test_a_folder_of_a_job_that_never_ran_and_one_that_is_none(folder: RunFolder) -> None:
    assert read_status(folder.path, NOW).state == "not started"
    with pytest.raises(UserError, match="no run folder"):
        read_status(folder.path.parent, NOW)


def test_mfu_is_of_the_dense_peak_and_none_where_that_is_unknown(folder: RunFolder) -> None:
    """Yuan 1.0 as published: 180B tokens in 13.8 days are 44.8% with recomputation counted, three quarters without."""
    model = {"layers": 76, "hidden": 16384, "heads": 128, "seq": 2048, "vocab": 53228}
    yuan = resolve(override(Job(), model=model, layout={"tp": 8, "pp": 38, "dp": 7}, train={"global_batch": 3360},
                            machine={"gpu": "a100-80g"}), 2128)
    tokens_per_s = 180e9 / (13.8 * 86400)
    mfu = model_flops_utilization(yuan, tokens_per_s, 2128)
    assert mfu == pytest.approx(0.448 * 6 / 8, rel=0.03)
    assert model_flops_utilization(override(yuan, machine={"gpu": "some-gpu"}), tokens_per_s, 2128) is None
    assert model_flops_utilization(override(yuan, train={"precision": "fp32"}), tokens_per_s, 2128) is None
    folder.config.write_text(to_toml(yuan))
    write(folder.journal, started(400))
    write(folder.metrics, *({**line, "tokens_per_s": 1e9} for line in STEPS))
    assert "ERROR, more than the peak" in describe(read_status(folder.path, NOW))
    assert cli.main(["status", str(folder.path)]) == 3
