"""The Yuan job on 266 real slurmd of one machine, and accepted at 1024 nodes: `make test-slurm-266` (root, 8 GiB free).

The job is the one that `hpcpar submit jobs/yuan-245b.toml` makes; only the command of its srun is replaced, by one
light task a node (`node_check.py`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.slurm.conftest import CLUSTER, ROOT, free_ports

CLOUD = """
ResumeProgram=/bin/true
SuspendProgram=/bin/true
SuspendTime=3600
NodeName=cloud[1-1024] CPUs=64 RealMemory=64000 Gres=gpu:8 State=CLOUD
PartitionName=cloud Nodes=cloud[1-1024] MaxTime=INFINITE State=UP
"""
WORDS = ["--cluster", ROOT / "slurm/clusters/a100-80g.toml", "--submit.stage_env", "", "--dry-run"]


def environment(folder: Path, nodes: int, extra: str = "") -> dict[str, str]:
    """Return the settings of a local cluster, and what its clients need."""
    own = {"HPCPAR_SLURM_DIR": str(folder), "HPCPAR_SLURM_ACCOUNTING": "0", "HPCPAR_SLURM_NODES": str(nodes),
           "HPCPAR_SLURM_CPUS": "64", "HPCPAR_SLURM_GPUS": "8", "HPCPAR_SLURM_PORT": str(free_ports(nodes + 16)),
           "HPCPAR_SLURM_EXTRA_CONF": extra, "HPCPAR_SLURM_TIMEOUT_S": "120"}
    return {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "PMI_"))} | own | {
        "SLURM_CONF": str(folder / "etc/slurm.conf"), "PYTHONPATH": str(ROOT)}


def call(env: dict[str, str], *words: object) -> str:
    """Run a command that must succeed; return what it prints."""
    done = subprocess.run([str(word) for word in words], env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def script_of(env: dict[str, str], run: Path, job: str, *words: object) -> Path:
    """Return the script that hpcpar makes of a job, its training replaced by the light task."""
    call(env, sys.executable, "-m", "hpcpar.cli", "submit", ROOT / "jobs" / job, "--run", run, *WORDS, *words)
    text = (run / "submit/dry-run.sh").read_text()
    light = Path(__file__).with_name("node_check.py")
    check = ("srun --ntasks-per-node=1 --ntasks=$SLURM_JOB_NUM_NODES --distribution=block --cpus-per-task=1 --mpi=none "
             f"--kill-on-bad-exit=1 {sys.executable} {light} {run}")
    text = re.sub(r"^timeout .*hpcpar.probe.*$", "", text, flags=re.MULTILINE)  # 266 times numpy and MPI: 16 GiB
    text, count = re.subn(r"^srun .*$", check, text, flags=re.MULTILINE)
    assert count == 1
    (run / "light.sh").write_text(text)
    return run / "light.sh"


def submit_and_run(folder: Path, nodes: int = 266) -> None:
    """Start the cluster, submit, wait for the end, and look at what the nodes have told."""
    env = environment(folder / "cluster", nodes)
    try:
        start = time.monotonic()
        subprocess.run([CLUSTER, "start"], env=env, check=True)  # not captured: the daemons keep the pipes open
        print(f"{nodes} slurmd up in {time.monotonic() - start:.1f} s, {_memory_gib(folder / 'cluster'):.1f} GiB",
              flush=True)
        run = folder / "run"
        script = script_of(env, run, "yuan-245b.toml")
        start = time.monotonic()
        job_id = call(env, "sbatch", "--parsable", script).strip()
        told, peak = run / "nodes", 0.0
        while (state := call(env, "squeue", "-h", "-t", "all", "-j", job_id, "-o", "%T").strip()) != "COMPLETED":
            assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), \
                state + "".join(path.read_text() for path in (run / "submit").glob("*.out"))
            assert time.monotonic() - start < 420, state
            peak = max(peak, _memory_gib(folder / "cluster"))
            time.sleep(2)
        agreed = [int(path.read_text()) for path in told.glob("*.agreed")]
        assert len(agreed) == nodes and sum(agreed) == 8 * nodes * (8 + 7 + 38 + 1)
        places = {tuple(place["at"]) for path in told.glob("*.json") for place in json.loads(path.read_text()).values()}
        assert len(places) == 8 * nodes == 2128
        print(f"job {job_id}: {nodes} nodes, 2128 ranks placed, {sum(agreed)} memberships of groups agreed, "
              f"{time.monotonic() - start:.1f} s from sbatch to COMPLETED, daemons at most {peak:.1f} GiB", flush=True)
    finally:
        subprocess.run([CLUSTER, "stop"], env=env, check=True)


def accepted_at_1024(folder: Path) -> None:
    """Ask Slurm whether it would take the job with 1024 nodes (8192 GPUs)."""
    env = environment(folder / "cloud", 1, CLOUD)
    try:
        subprocess.run([CLUSTER, "start"], env=env, check=True)
        script = script_of(env, folder / "run-1024", "yuan-245b.toml", "--machine.nodes", 1024, "--layout.pp", 32,
                           "--layout.dp", 32, "--submit.partition", "cloud")
        done = subprocess.run(["sbatch", "--test-only", script], env=env, text=True, capture_output=True, check=False)
        assert done.returncode == 0 and "using 65536 processors" in done.stderr, done.stderr
        print("1024 nodes: sbatch --test-only would start it", done.stderr.strip().partition(" using ")[2])
    finally:
        subprocess.run([CLUSTER, "stop"], env=env, check=True)


def _memory_gib(folder: Path) -> float:
    """Return the memory of this cluster's daemons, shared pages shared out."""
    total = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (path / "cmdline").read_bytes():
                found = re.search(r"^Pss:\s+(\d+)", (path / "smaps_rollup").read_text(), re.MULTILINE)
                total += int(found[1]) if found else 0
        except OSError:
            continue
    return total / 2**20


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="hpcpar-266-") as name:
        Path(name).chmod(0o755)
        accepted_at_1024(Path(name))
        submit_and_run(Path(name))
