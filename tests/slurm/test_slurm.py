"""Submission to a real Slurm: slurm/local-cluster.sh brings it up for this file, and it is stopped afterwards."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hpcpar

pytestmark = pytest.mark.slurm
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


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Four nodes without accounting; yields the environment for Slurm's commands."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))):
        pytest.skip(f"needs root and Slurm on this machine: {CLUSTER} install")
    folder = tmp_path_factory.mktemp("cluster")
    folder.parent.parent.chmod(0o755), folder.parent.chmod(0o755)  # munged wants parents that others can enter
    own = {"HPCPAR_SLURM_DIR": str(folder), "HPCPAR_SLURM_ACCOUNTING": "0", "HPCPAR_SLURM_PORT": str(free_ports(16))}
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

    def submit(self) -> str:
        return self.call(sys.executable, "-c", "import os, pathlib; from hpcpar.submit.slurm import submit\n"
                         "print(submit(pathlib.Path('job.toml'), [], pathlib.Path('run'), os.environ).job_id)").strip()

    def told(self, time_: int = 0) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(self.run.glob(f"told-*-{time_}.json"))]

    def state(self, job_id: str) -> str:
        return self.call("squeue", "-h", "-t", "all", "-j", job_id, "-o", "%T").strip()

    def logs(self) -> str:
        files = [*self.folder.glob("slurm-*.out"), *self.run.glob("submit/*.out")]
        return "\n".join(f"== {path}\n{path.read_text()}" for path in files)

    def until(self, holds: Callable[[], bool], limit_s: float = 40) -> None:
        end = time.monotonic() + limit_s
        while not holds():
            assert time.monotonic() < end, self.call("scontrol", "show", "jobs") + self.logs()
            time.sleep(0.1)

    def until_state(self, job_id: str, *states: str) -> None:
        self.until(lambda: self.state(job_id) in states)


@pytest.fixture
def place(tmp_path: Path, cluster: dict[str, str]) -> Place:
    return Place(tmp_path, cluster)


def start(place: Place, way: str) -> str:
    return place.sbatch() if way == "sbatch" else place.submit()


WORLD = [[0, "0"], [1, "0"], [2, "1"], [3, "1"]]
both_ways = pytest.mark.parametrize("way", ["sbatch", "submit"])


@both_ways
def test_two_nodes_are_one_world(place, way):
    job_id = start(place, way)
    place.until_state(job_id, "COMPLETED")
    assert [rank["world"] for rank in place.told()] == [WORLD] * 4, place.logs()


def test_submission_freezes_the_code_and_keeps_the_shells_variables_out(place):
    place.environment |= {"SBATCH_PARTITION": "elsewhere", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "PMI_SIZE": "9"}
    job_id = place.submit()
    (place.source / "hpcpar/cli.py").write_text("raise SystemExit('the edited source ran')")
    place.until_state(job_id, "COMPLETED")
    for rank in place.told():
        assert rank["file"].startswith(f"{place.run}/submit/code-")
        assert rank["words"] == ["train", f"{place.run}/submit/job.toml", "--run", str(place.run)]
        assert rank["environment"].get("SLURM_CPU_BIND") != "quiet,mask_cpu:0x1"
        assert rank["environment"]["PMI_SIZE"] == "4" and "SBATCH_PARTITION" not in rank["environment"]
    # what a dry run shows is what Slurm got
    place.call(sys.executable, "-c", "import os, pathlib; from hpcpar.submit.slurm import Request, submit\n"
               "submit(pathlib.Path('job.toml'), [], pathlib.Path('run'), os.environ, Request(dry_run=True))",
               PYTHONPATH=next(str(path) for path in place.run.glob("submit/code-*")))
    real = (place.run / f"submit/{job_id}_submission.sh").read_text()
    assert (place.run / "submit/dry-run.sh").read_text() == real


@both_ways
def test_a_signal_stops_cleanly_and_the_requeued_job_finishes(place, way):
    place.run.mkdir()
    (place.run / "wait").touch()
    job_id = start(place, way)
    place.until(lambda: len(place.told()) == 4)
    place.call("scancel", "--signal=USR2", job_id)  # what --signal does before the time limit
    place.until_state(job_id, "PENDING")
    assert len(list(place.run.glob("signalled-*"))) == 4, place.logs()
    assert "12" in (place.run / "signalled-3").read_text()  # on the second node too
    time.sleep(2)  # a node refuses credentials of the second in which it was told to end the job

    def completed() -> bool:
        if place.state(job_id) == "PENDING":  # Slurm waits two minutes, and sets them anew when the old step has ended
            subprocess.run(["scontrol", "update", f"jobid={job_id}", "starttime=now"], env=place.environment,
                           check=False)  # refused where it has started meanwhile
        return place.state(job_id) == "COMPLETED"

    place.until(completed)
    assert len(place.told(1)) == 4, place.logs()


@both_ways
def test_a_stop_file_is_not_requeued(place, way):
    place.run.mkdir()
    (place.run / "wait").touch()
    job_id = start(place, way)
    place.until(lambda: len(place.told()) == 4)
    (place.run / "STOP").touch()
    place.call("scancel", "--signal=USR1", job_id)
    place.until_state(job_id, "COMPLETED", "FAILED")
    assert "not requeued" in place.logs() and not place.told(1)


@both_ways
def test_a_failing_rank_ends_the_job_at_once(place, way):
    (place.source / "hpcpar/cli.py").write_text("import os, time\nfrom mpi4py import MPI\ndef main(words):\n"
                                                "    if MPI.COMM_WORLD.rank == 2: os._exit(3)\n    time.sleep(60)\n")
    job_id = start(place, way)
    place.until_state(job_id, "FAILED")
    assert "ExitCode=3:0" in place.call("scontrol", "show", "job", job_id) or "exit code 3" in place.logs()


@both_ways
def test_scancel_lets_the_ranks_save_and_is_not_undone_by_a_requeue(place, way):
    place.run.mkdir()
    (place.run / "wait").touch()
    job_id = start(place, way)
    place.until(lambda: len(place.told()) == 4)
    place.call("scancel", job_id)
    place.until_state(job_id, "CANCELLED")
    assert len(list(place.run.glob("signalled-*"))) == 4
    assert "Restarts=0" in place.call("scontrol", "show", "job", job_id)
