"""Real training under a real Slurm, stopped in every way there is: it goes on, and its curve is the uninterrupted one.

`make test-slurm`; prints how long each fault took to end the ranks, and to the first step after the restart.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpcpar.checkpoint.verify import latest_set, verify_set
from hpcpar.config.load import to_toml
from hpcpar.config.run_folder import read_lines
from tests.slurm.conftest import CLUSTER, Place
from tests.train.small import make_job, make_store

pytestmark = [pytest.mark.slurm, pytest.mark.long]
STEPS = 30
MEASURED: list[str] = []


class RealPlace(Place):
    """A folder with a job of 4 ranks on 2 nodes, and `hpcpar` as it is."""

    def __init__(self, folder: Path, environment: dict[str, str], store: Path):
        self.folder, self.run = folder, folder / "run"
        job = make_job(store, model={"dropout": 0.1}, layout={"tp": 2, "dp": 2}, train={"steps": STEPS},
                       optim={"decay_steps": STEPS}, checkpoint={"every": 5, "keep": 3},
                       data={"validate_every": 0, "validate_samples": 0},
                       machine={"nodes": 2, "gpus_per_node": 2, "gpu": "cpu"}, submit={"walltime_min": 10})
        (folder / "job.toml").write_text(to_toml(job))
        beside = Path(sys.executable).parent
        # slow enough to be hit in the middle of something
        self.environment = {**environment, "PATH": f"{beside}:{environment['PATH']}", "OMP_NUM_THREADS": "1",
                            "PYTHONPATH": str(CLUSTER.parent.parent)}

    def submit(self, *words: object) -> str:
        done = self.call(sys.executable, "-m", "hpcpar.cli", "submit", "job.toml", "--run", self.run, *words)
        return done.split("job ")[1].split(":")[0]

    def step(self) -> int:
        return max((line["step"] for line in read_lines(self.run / "metrics.jsonl") if "loss" in line), default=0)

    def until_step(self, step: int, limit_s: float = 400) -> None:
        self.until(lambda: self.step() >= step, limit_s)

    def curve(self) -> dict[int, tuple[float, str]]:
        lines = [line for line in read_lines(self.run / "metrics.jsonl") if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))  # each step once
        return {line["step"]: (line["loss"], line["samples_hash"]) for line in lines}

    def ranks(self, node: str = "") -> list[int]:
        """List this run's ranks (on a node) by what their processes were started with."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                command = (path / "cmdline").read_bytes()
            except OSError:
                continue
            if b"submitit.core._submit" in command and f"{self.run}/submit".encode() in command and \
                    self._variable(path, "SLURM_PROCID") and self._variable(path, "SLURMD_NODENAME").startswith(node):
                found.append(int(path.name))
        return found

    def lose(self, node: str) -> None:
        """Kill all that runs on a node, as a loss of power does: slurmd, its steps, and what these started."""
        self.call(CLUSTER, "node-kill", node)
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")
                if self._variable(path, "SLURMD_NODENAME") == node]
        parents = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in pids}
        names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in {*pids, *parents}}
        lost = [pid for pid in names if pid in pids or names[pid] == "slurmstepd"]
        # none may see another's end; srun first, as the kernel wakes it when the shell that has stopped too is gone
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in sorted(lost, key=lambda pid: names[pid] != "srun"):
                os.kill(pid, number)

    @staticmethod
    def _variable(process: Path, name: str) -> str:
        try:
            words = (process / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            return ""
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")

    def until_gone(self, fault: str, start: float, limit_s: float = 60) -> None:
        self.until(lambda: not self.ranks(), limit_s)
        MEASURED.append(f"{fault}: last rank gone after {time.monotonic() - start:.1f} s")

    def finish(self, job_id: str, fault: str) -> None:
        """Let the requeued job start at once, and wait for its end."""
        before = self.step()
        time.sleep(2)

        def starts() -> list[float]:
            return [line["time"] for line in read_lines(self.run / "submit/starts.jsonl") if "nodes" in line]

        def stepped() -> bool:
            if self.state(job_id) == "PENDING":
                subprocess.run(["scontrol", "update", f"jobid={job_id}", "starttime=now"], env=self.environment,
                               check=False, capture_output=True)
            return len(starts()) > 1 and self.step() != before

        self.until(stepped, 600)
        MEASURED.append(f"{fault}: first step {time.time() - starts()[-1]:.1f} s after Slurm started the job again")
        self.until_state(job_id, "COMPLETED", limit_s=600)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("text"))


@pytest.fixture
def place(tmp_path: Path, cluster: dict[str, str], store: Path) -> Iterator[RealPlace]:
    place = RealPlace(tmp_path, cluster, store)
    yield place
    subprocess.run(["scancel", "-u", "root"], env=place.environment, check=False)
    place.until(lambda: not place.call("squeue", "-h"), 60)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, cluster: dict[str, str], store: Path
                  ) -> dict[int, tuple[float, str]]:
    """The curve of a run that nothing happens to, on 8 tasks over 2 nodes."""
    place = RealPlace(tmp_path_factory.mktemp("uninterrupted"), cluster, store)
    job_id = place.submit("--layout.pp", "2", "--machine.gpus_per_node", "4")
    place.until_state(job_id, "COMPLETED", limit_s=900)
    assert len(list((place.run / "logs").glob("rank-*.log"))) == 8
    return place.curve()


def assert_same(place: RealPlace, uninterrupted: dict[int, tuple[float, str]]) -> None:
    curve = place.curve()
    assert len(curve) == STEPS and {s: v[1] for s, v in curve.items()} == {s: v[1] for s, v in uninterrupted.items()}
    for step, (loss, _) in curve.items():
        assert loss == pytest.approx(uninterrupted[step][0], rel=1e-11), step


def test_a_signal_as_before_the_time_limit(place, uninterrupted):
    job_id = place.submit()
    place.until_step(7)
    start = time.monotonic()
    place.call("scancel", "--signal=USR2", job_id)
    place.until_gone("signal before the time limit", start)
    stopped = place.step()
    found = latest_set(place.run / "checkpoints")
    assert found is not None and found.name == f"step-{stopped:08d}" and verify_set(found)
    place.finish(job_id, "signal before the time limit")
    assert_same(place, uninterrupted)


def test_a_real_time_limit(place, uninterrupted):
    """One minute, of which the signal takes half; the steps are slowed so that one job cannot hold them."""
    (place.folder / "slow").mkdir()
    (place.folder / "slow/sitecustomize.py").write_text(SLOW)
    place.environment["PYTHONPATH"] += f":{place.folder}/slow"
    job_id = place.submit("--submit.walltime_min", "1")
    place.until(lambda: place.shown(job_id)["Restarts"] == "1", 100)
    assert place.step() < STEPS and "DUE TO TIME LIMIT" not in place.logs()
    (place.folder / "slow/sitecustomize.py").unlink()
    place.finish(job_id, "time limit")
    assert_same(place, uninterrupted)


SLOW = """
import sys, threading, time
def slow():
    while "hpcpar.train.loop" not in sys.modules or not hasattr(sys.modules["hpcpar.train.loop"], "train_step"):
        time.sleep(0.05)
    loop = sys.modules["hpcpar.train.loop"]
    step = loop.train_step
    loop.train_step = lambda *words: (time.sleep(2), step(*words))[1]
if "SLURM_PROCID" in __import__("os").environ:
    threading.Thread(target=slow, daemon=True).start()
"""


@pytest.mark.parametrize("mode", ["requeued", "cancelled"])
def test_preemption(place, uninterrupted, mode):
    job_id = place.submit("--submit.partition", mode)
    place.until_step(7)
    start = time.monotonic()
    urgent = place.call("sbatch", "--parsable", "-p", "urgent", "-N4", "--exclusive", "--wrap", "sleep 3").strip()
    place.until_gone(f"preemption, {mode}", start)
    place.until_state(urgent, "COMPLETED", limit_s=60)
    stopped = place.step()
    found = latest_set(place.run / "checkpoints")
    assert found is not None and found.name == f"step-{stopped:08d}" and verify_set(found)
    place.finish(job_id, f"preemption, {mode}")
    assert_same(place, uninterrupted)


def test_a_node_is_lost(place, uninterrupted):
    job_id = place.submit()
    place.until_step(7)
    nodes = json.loads((place.run / "submit/starts.jsonl").read_text())["nodes"]
    start = time.monotonic()
    pids = place.ranks(nodes[1])
    assert len(pids) == 2
    place.call(CLUSTER, "node-kill", nodes[1])
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    try:
        place.until_gone("node lost", start, 90)
        place.until(lambda: int(place.shown(job_id)["Restarts"]) >= 1, 90)
        MEASURED.append(f"node lost: requeued after {time.monotonic() - start:.1f} s (SlurmdTimeout 10 s)")
        place.finish(job_id, "node lost")
    finally:
        subprocess.run([CLUSTER, "node-start", nodes[1]], env=place.environment, check=True)
    assert_same(place, uninterrupted)
    assert nodes[1] in (place.run / "submit/bad-nodes").read_text()
    again = json.loads((place.run / "submit/starts.jsonl").read_text().splitlines()[-2])
    assert nodes[1] not in again["nodes"] and f"{nodes[1]} let this run down" in place.logs()
    place.until_in_service(nodes[1])


def test_a_task_is_killed(place, uninterrupted):
    job_id = place.submit()
    place.until_step(7)
    nodes = json.loads((place.run / "submit/starts.jsonl").read_text())["nodes"]
    start = time.monotonic()
    os.kill(place.ranks(nodes[1])[0], signal.SIGKILL)
    place.until_gone("task killed", start, 90)
    failure = json.loads((place.run / "failure.json").read_text())
    assert failure["error"] == "Died" and failure["rank"] in (2, 3)
    place.finish(job_id, "task killed")
    assert_same(place, uninterrupted)
    assert place.shown(job_id)["ExcNodeList"] == nodes[1]
    assert (place.run / "submit/bad-nodes").read_text().startswith(f"{nodes[1]} rank {failure['rank']}: ")


def test_an_elastic_job_goes_on_with_fewer_nodes(place, uninterrupted):
    """Four nodes with a replica each; one is lost, and no other is there: two replicas go on."""
    job_id = place.submit("--machine.nodes", "4", "--layout.dp", "4", "--elastic")
    place.until_step(7)
    start = time.monotonic()
    pids = place.ranks("node4")
    place.call(CLUSTER, "node-kill", "node4")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    try:
        place.until_gone("elastic, node lost", start, 90)
        place.until(lambda: int(place.shown(job_id)["Restarts"]) >= 1, 90)
        place.finish(job_id, "elastic, node lost")
    finally:
        subprocess.run([CLUSTER, "node-start", "node4"], env=place.environment, check=True)
    assert_same(place, uninterrupted)
    assert "elastic: 3 of 4 nodes: dp 2 instead of 4" in place.logs()
    place.until_in_service("node4")


@contextmanager
def patience(place: RealPlace, seconds: int) -> Iterator[None]:
    """Let Slurm miss a node only after so many seconds instead of ten."""
    configuration = Path(place.environment["SLURM_CONF"])
    settings = configuration.read_text()
    configuration.write_text(settings.replace("SlurmdTimeout=10\n", f"SlurmdTimeout={seconds}\n"))
    place.call("scontrol", "reconfigure")
    try:
        yield
    finally:
        configuration.write_text(settings)
        place.call("scontrol", "reconfigure")


@pytest.mark.parametrize("first", ["another node", "Slurm"])
def test_an_elastic_job_that_loses_its_batch_node_goes_on_with_fewer(place, uninterrupted, first):
    """Script, srun and prologue lived there: another node does what they would have, before or after Slurm notices."""
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("nodes are hosts of their own only where root may make namespaces")
    fault = f"elastic, batch node lost, noticed by {first} first"

    def mark_down() -> None:
        place.call("scontrol", "update", "nodename=node1", "state=down", "reason=lost")

    with patience(place, 300):  # as it is by default
        job_id = place.submit("--machine.nodes", "4", "--layout.dp", "4", "--elastic")
        place.until(lambda: latest_set(place.run / "checkpoints") is not None, 400)
        start = time.monotonic()
        place.lose("node1")
        try:
            if first == "Slurm":
                place.until((place.run / "failure.json").exists, 60)
                mark_down()
            place.until(lambda: (place.run / "submit/heir").exists() and (place.run / "submit/heir").read_text(), 60)
            MEASURED.append(f"{fault}: another node has acted after {time.monotonic() - start:.1f} s")
            job = place.shown(job_id)
            assert (job["NumTasks"], job["ExcNodeList"], job["Restarts"]) == ("4", "node1", "1")
            place.until_gone(fault, start, 90)
            if first != "Slurm":
                mark_down()  # as Slurm does itself in five minutes: until then the job is completing
            place.finish(job_id, fault)
        finally:
            subprocess.run([CLUSTER, "node-start", "node1"], env=place.environment, check=True)
    assert_same(place, uninterrupted)
    assert "elastic: 3 of 4 nodes: dp 2 instead of 4" in place.logs()
    assert (place.run / "submit/bad-nodes").read_text() == "node1 lost, and the batch script with it\n"
    failure = json.loads((place.run / "failure-1.json").read_text())
    assert (failure["error"], failure["host"], failure["phase"]) == ("HostSilent", "node1", "step")
    lines = read_lines(place.run / "submit/starts.jsonl")
    assert [word for line in lines for word in ("nodes", "heir", "end") if word in line] == [
        "nodes", "heir", "nodes", "end"] and lines[2]["step"] is not None
    place.until_in_service("node1")


def test_scancel_leaves_a_verified_checkpoint(place, uninterrupted):
    job_id = place.submit()
    place.until_step(7)
    start = time.monotonic()
    place.call("scancel", job_id)
    place.until_gone("scancel", start)
    place.until_state(job_id, "CANCELLED")
    found = latest_set(place.run / "checkpoints")
    assert found is not None and found.name == f"step-{place.step():08d}" and verify_set(found)
    job_id = place.submit("--until", "20")  # the same command goes on
    place.until_state(job_id, "COMPLETED", limit_s=600)
    assert list(place.curve()) == list(range(1, 21))
    job_id = place.submit()
    place.until_state(job_id, "COMPLETED", limit_s=600)
    assert_same(place, uninterrupted)


def test_the_figures(capsys):
    with capsys.disabled():
        print("\n" + "\n".join(MEASURED))
    assert len(MEASURED) > 10
