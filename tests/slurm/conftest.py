"""A real Slurm for these tests: slurm/local-cluster.sh brings it up, and it is stopped afterwards."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import hpcpar

ROOT = Path(hpcpar.__file__).parent.parent
CLUSTER = ROOT / "slurm/local-cluster.sh"
JOB = """
[model]
layers = 2
hidden = 64
heads = 2
[layout]
tp = 2
dp = 2
[train]
global_batch = 4
[machine]
gpu = "cpu"
nodes = 2
gpus_per_node = 2
[submit]
walltime_min = 5
"""
# Stands in for training: the first time it waits for a signal on one rank, agrees on it, and wants to go on;
# the second time it is done.
CLI = """
import json, os, pathlib, signal, sys, time
def main(words):
    signalled = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: signalled.append(number))
    from mpi4py import MPI
    comm, run = MPI.COMM_WORLD, pathlib.Path(words[words.index("--run") + 1])
    world = comm.allgather((comm.rank, os.environ["SLURM_NODEID"]))
    again = bool(list(run.glob("told-0-*")))
    comm.Barrier()
    told = dict(words=words, world=world, file=__file__, environment=dict(os.environ))
    (run / f"part-{comm.rank}").write_text(json.dumps(told))
    (run / f"part-{comm.rank}").rename(run / f"told-{comm.rank}-{int(again)}.json")
    if not (run / "wait").exists() or again:
        return 0
    end = time.monotonic() + 60
    while not comm.allreduce(len(signalled)):
        if time.monotonic() > end:
            return 3
        time.sleep(0.02)
    time.sleep(0.3 + 0.3 * comm.rank)  # the signal may reach the other nodes later; ranks never leave at one moment
    (run / f"signalled-{comm.rank}").write_text(str(signalled))
    return 75
"""


EXTRA_CONF = """
MaxArraySize=3
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=short Nodes=ALL MaxTime=10 MaxNodes=3
PartitionName=requeued Nodes=ALL PriorityTier=1 GraceTime=30 PreemptMode=REQUEUE
PartitionName=cancelled Nodes=ALL PriorityTier=1 GraceTime=30 PreemptMode=CANCEL
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Four nodes, partitions that preempt, small arrays, no accounting; yields the environment for Slurm's commands."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))):
        pytest.skip(f"needs root and Slurm on this machine: {CLUSTER} install")
    folder = tmp_path_factory.mktemp("cluster")
    for parent in folder.parents:  # munged wants parents that others can enter
        if Path(tempfile.gettempdir()) in parent.parents:
            parent.chmod(parent.stat().st_mode | 0o055)
    own = {"HPCPAR_SLURM_DIR": str(folder), "HPCPAR_SLURM_ACCOUNTING": "0", "HPCPAR_SLURM_PORT": str(free_ports(16)),
           "HPCPAR_SLURM_EXTRA_CONF": EXTRA_CONF}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PMI_", "SBATCH_"))} | own
    # not captured: the daemons would keep the pipes open
    try:
        subprocess.run([CLUSTER, "start"], env=environment, check=True, timeout=60)
        yield {**environment, "SLURM_CONF": str(folder / "etc/slurm.conf")}
    finally:
        subprocess.run([CLUSTER, "stop"], env=environment, check=True, timeout=60)


def free_ports(count: int) -> int:
    """Return the first of `count` ports in a row that nobody uses now."""
    for first in range(21000 + os.getpid() % 500 * 16, 32000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise RuntimeError("no free ports")


class Place:
    """A folder with a job and a light `hpcpar`, and Slurm's commands in it."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.run = folder, folder / "run"
        self.source = folder / "source"
        shutil.copytree(ROOT / "hpcpar", self.source / "hpcpar", ignore=shutil.ignore_patterns("__pycache__"))
        (self.source / "hpcpar/cli.py").write_text(CLI)
        (folder / "bin").mkdir()
        command = folder / "bin/hpcpar"
        command.write_text(f"#!/bin/sh\nexec {sys.executable} -m hpcpar.entry \"$@\"\n")
        command.chmod(0o755)
        (folder / "job.toml").write_text(JOB)
        beside = Path(sys.executable).parent
        self.environment = {**environment, "PATH": f"{folder}/bin:{beside}:{environment['PATH']}", "RUN": str(self.run),
                            "PYTHONPATH": str(self.source), "PYTHONSAFEPATH": "1"}

    def call(self, *words: object, **more: str) -> str:
        answer = subprocess.run([str(word) for word in words], cwd=self.folder, env={**self.environment, **more},
                                capture_output=True, text=True, timeout=60)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    def sbatch(self) -> str:
        script = ROOT / "slurm/train.sbatch"
        return self.call("sbatch", "--parsable", "-N2", "--ntasks-per-node=2", "-t5", script, "job.toml").strip()

    def submit(self, words: Sequence[str] = (), request: str = "") -> str:
        return self.call(sys.executable, "-c", "import os, pathlib; from hpcpar.submit.slurm import Request, submit\n"
                         f"done = submit(pathlib.Path('job.toml'), {list(words)}, pathlib.Path('run'), os.environ, "
                         f"Request({request}))\nprint(*(job.job_id for job in done.jobs))").strip()

    def told(self, time_: int = 0) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(self.run.glob(f"told-*-{time_}.json"))]

    def state(self, job_id: str) -> str:
        return self.call("squeue", "-h", "-t", "all", "-j", job_id, "-o", "%T").strip()

    def logs(self) -> str:
        files = [*self.folder.glob("slurm-*.out"), *self.run.glob("submit/*.out")]
        return "\n".join(f"== {path}\n{path.read_text()}" for path in files)

    def until(self, holds: Callable[[], bool], limit_s: float = 90) -> None:
        end = time.monotonic() + limit_s
        while not holds():
            assert time.monotonic() < end, self.call("sinfo", "-N", "-o", "%N %P %T %E") + self.call(
                "squeue", "-t", "all", "-o", "%i %j %T %N %M %r") + self.logs()
            time.sleep(0.1)

    def until_in_service(self, *nodes: str) -> None:
        """Wait until nodes answer and take jobs; Slurm 22.05 may show a free one as mixed until something changes."""
        def states() -> set[str]:
            return set(self.call("sinfo", "-h", "-N", "-n", ",".join(nodes), "-p", "main", "-o", "%T").split())

        self.until(lambda: bool(found := states()) and found <= {"idle", "mixed"}, 60)

    def until_state(self, job_id: str, *states: str, limit_s: float = 90) -> None:
        self.until(lambda: self.state(job_id) in states, limit_s)

    def until_completed_again(self, job_id: str, limit_s: float = 90, state: str = "COMPLETED") -> None:
        """Wait for the end of a requeued job; Slurm waits two minutes, set anew when the old step has ended."""
        time.sleep(2)  # a node refuses credentials of the second in which it was told to end the job

        def completed() -> bool:
            if self.state(job_id) == "PENDING":
                subprocess.run(["scontrol", "update", f"jobid={job_id}", "starttime=now"], env=self.environment,
                               check=False, capture_output=True)  # refused where it has started meanwhile
            return self.state(job_id) == state

        self.until(completed, limit_s)

    def shown(self, job_id: str) -> dict[str, str]:
        words = self.call("scontrol", "-o", "show", "job", job_id).split()
        return {name: value for name, _, value in (word.partition("=") for word in words)}


@pytest.fixture
def place(tmp_path: Path, cluster: dict[str, str]) -> Place:
    """A folder with a light door instead of training."""
    return Place(tmp_path, cluster)
