"""What a start must not cost: modules that no step needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpcpar.config.load import to_toml
from tests.train.small import make_job, make_store

TRAIN = """
import sys
from hpcpar import cli
code = cli.main(["train", "job.toml", "--run", "run"])
needless = sorted({"sympy", "torch._dynamo", "matplotlib", "rich", "transformers"} & set(sys.modules))
if needless:
    print("imported:", needless, file=sys.stderr)
sys.exit(code or 3 * bool(needless))
"""


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")
def test_a_run_imports_neither_dynamo_nor_sympy(tmp_path: Path) -> None:
    """Either takes eight ranks on two cores seconds. With layout.recompute, torch.utils.checkpoint imports both."""
    job = make_job(make_store(tmp_path), layout={"pp": 2}, train={"steps": 2}, data={
        "validate_every": 0, "validate_samples": 0})
    (tmp_path / "job.toml").write_text(to_toml(job))
    done = subprocess.run(["mpirun", "-n", "2", sys.executable, "-c", TRAIN], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
