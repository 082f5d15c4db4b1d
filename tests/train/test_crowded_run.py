"""`hpcpar train` with more ranks than cores: the earlier stage gives way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hpcpar.config.load import to_toml
from hpcpar.layout.precedence import LEVELS
from tests.train.small import make_job, make_store

CODE = """
import os, sys
from pathlib import Path
from hpcpar import cli
from hpcpar.config.surroundings import Surroundings
place = Path(sys.argv.pop(1))
code = cli.main(sys.argv[1:])
(place / f"level-{Surroundings.read(os.environ).rank}").write_text(str(os.getpriority(os.PRIO_PROCESS, 0)))
sys.exit(code)
"""


def test_the_earlier_of_two_stages_on_one_core_gives_way(tmp_path: Path) -> None:
    make_store(tmp_path)
    job, run = tmp_path / "job.toml", tmp_path / "run"
    job.write_text(to_toml(make_job(tmp_path / "store", layout={"pp": 2}, train={"steps": 2})))
    core = str(min(os.sched_getaffinity(0)))
    command = ["taskset", "-c", core, "mpirun", "-n", "2", sys.executable, "-c", CODE, str(tmp_path)]
    subprocess.run([*command, "train", str(job), "--run", str(run)], capture_output=True, timeout=120, check=True)
    assert [int((tmp_path / f"level-{rank}").read_text()) for rank in (0, 1)] == [LEVELS, 0]
