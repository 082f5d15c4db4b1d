"""The trainer's executor plays every schedule that paper does, and no step is shorter than on paper."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hpcpar

SCRIPT = Path(hpcpar.__file__).parent.parent / "benchmarks/schedules.py"


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")
def test_the_benchmark_plays_all_schedules():
    command = ["mpirun", "-n", "2", sys.executable, str(SCRIPT), "--rank", "--microbatches", "4", "--sleep-ms", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [row["schedule"] for row in rows] == ["gpipe", "1f1b", "interleaved", "breadth-first", "zero-bubble", "zbv",
                                                 "dualpipev"]
    assert all(row["measured_s"] >= row["foretold_s"] >= row["ideal_s"] for row in rows)
    assert all(row["plain_s"] > row["foretold_s"] for row in rows)
