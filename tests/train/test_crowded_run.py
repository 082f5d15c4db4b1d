"""`hpcpar train` with more ranks than cores: the earlier stage gives way, in its process and its session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hpcpar.config.load import to_toml
from hpcpar.layout.precedence import LEVELS
from tests.train.small import make_job, make_store

CODE = """
import json, os, sys
from hpcpar import cli
from hpcpar.config.surroundings import Surroundings
code = cli.main(sys.argv[1:])
print(json.dumps(["level", Surroundings.read(os.environ).rank, os.getpriority(os.PRIO_PROCESS, 0)]), flush=True)
sys.exit(code)
"""


def test_the_earlier_of_two_stages_on_one_core_gives_way(tmp_path: Path) -> None:
    make_store(tmp_path)
    job = tmp_path / "job.toml"
    job.write_text(to_toml(make_job(tmp_path / "store", layout={"pp": 2}, train={"steps": 2})))
    command = ["mpirun", "-n", "2", sys.executable, "-c", CODE, "train", str(job), "--run", str(tmp_path / "run")]
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(["taskset", "-c", str(core), *command], capture_output=True, text=True, timeout=120,
                          check=True)
    levels = {rank: level for _, rank, level in
              (json.loads(line) for line in done.stdout.splitlines() if line.startswith('["level"'))}
    assert levels == {0: LEVELS, 1: 0}
