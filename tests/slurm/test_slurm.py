"""Submission to a real Slurm, with a light door instead of training: who is started where, what comes after."""

import json
import os
import pickle
import pickletools
import subprocess
import sys
import sysconfig

import pytest

from hpcpar.config.load import load_job
from hpcpar.errors import UserError
from hpcpar.submit.slurm import submit
from hpcpar.submit.tasks import TrainTask
from tests.slurm.conftest import CLUSTER

pytestmark = pytest.mark.slurm


def start(place, way: str) -> str:
    return place.sbatch() if way == "sbatch" else place.submit()


WORLD = [[0, "0"], [1, "0"], [2, "1"], [3, "1"]]
both_ways = pytest.mark.parametrize("way", ["sbatch", "submit"])


@both_ways
def test_two_nodes_are_one_world(place, way):
    job_id = start(place, way)
    place.until_state(job_id, "COMPLETED")
    assert [rank["world"] for rank in place.told()] == [WORLD] * 4, place.logs()


FULL_HEAP = """
kept = [bytes([65 + i % 50]) * size for i in range(300) for size in range(513, 2049, 16)]
kept = [block for i, block in enumerate(kept) if i % 3]  # every third place is free again
holes = [bytes([65 + i % 50]) * size for i in range(200) for size in range(200, 513, 16)][::2]
"""


@both_ways
def test_a_rank_whose_memory_is_full_starts(place, way):
    """What lies behind its address in memory does not get into the request that Slurm's pmi2 takes 1024 bytes of."""
    door = place.source / "hpcpar/cli.py"
    door.write_text(FULL_HEAP + door.read_text())
    job_id = start(place, way)
    place.until_state(job_id, "COMPLETED")
    assert [rank["world"] for rank in place.told()] == [WORLD] * 4, place.logs()


@pytest.mark.long
def test_ranks_that_call_each_other_at_one_moment_start(place):
    """Sixty starts on three nodes: over libfabric's sockets one in thirty waits for ever."""
    (place.folder / "many.sh").write_text(
        f"""#!/bin/bash
        lines=$({sys.executable} -m hpcpar.submit.batch start "$RUN") || exit
        eval "$lines"
        for start in $(seq 60); do
            timeout --signal=KILL 20 srun --mpi=pmi2 {sys.executable} -c '
from mpi4py import MPI
MPI.COMM_WORLD.allgather(MPI.COMM_WORLD.rank)' || exit
            echo "start $start"
        done
        """)
    job_id = place.call("sbatch", "--parsable", "-N3", "--ntasks-per-node=2", "-t5", "many.sh").strip()
    place.until_state(job_id, "COMPLETED", "FAILED", limit_s=280)
    assert place.state(job_id) == "COMPLETED" and "start 60" in place.logs(), place.logs()


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
    place.until_completed_again(job_id)
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
    failing = DYING.replace("STEP", "None").replace("_exit(9)", "_exit(3)").replace("Died", "SomeError")
    (place.source / "hpcpar/cli.py").write_text(failing)
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


@both_ways
def test_where_requeue_is_refused_a_follow_up_job_goes_on(place, way):
    place.run.mkdir(mode=0o700)
    (place.run / "wait").touch()
    job_id = start(place, way)
    place.until(lambda: len(place.told()) == 4)
    place.call("scontrol", "update", f"jobid={job_id}", "requeue=0")
    place.call("scancel", "--signal=USR2", job_id)
    place.until_state(job_id, "COMPLETED")
    follow_up = str(int(job_id) + 1)
    assert f"requeue refused; job {follow_up} goes on" in place.logs()
    place.until_state(follow_up, "COMPLETED")
    assert [rank["world"] for rank in place.told(1)] == [WORLD] * 4
    assert place.told(1)[0]["words"] == place.told(0)[0]["words"]
    assert place.shown(follow_up)["NumNodes"] == "2" and place.shown(follow_up)["TimeLimit"] == "00:05:00"


@pytest.mark.parametrize("mode", ["requeued", "cancelled"])
def test_a_preempted_job_saves_and_goes_on(place, mode):
    place.run.mkdir(mode=0o700)
    (place.run / "wait").touch()
    job_id = place.submit(["--submit.partition", mode])
    place.until(lambda: len(place.told()) == 4)
    urgent = place.call("sbatch", "--parsable", "-p", "urgent", "-N4", "--exclusive", "--wrap", "sleep 1").strip()
    place.until(lambda: len(list(place.run.glob("signalled-*"))) == 4)
    place.until_state(urgent, "COMPLETED")
    place.until_completed_again(job_id)
    assert [rank["world"] for rank in place.told(1)] == [WORLD] * 4 and not (place.run / "submit/bad-nodes").exists()


@pytest.mark.long
def test_a_job_that_loses_a_node_goes_on_without_it(place):
    place.run.mkdir(mode=0o700)
    (place.run / "wait").touch()
    job_id = place.submit()
    place.until(lambda: len(place.told()) == 4)
    node = json.loads((place.run / "submit/starts.jsonl").read_text())["nodes"][1]
    place.call(CLUSTER, "node-kill", node)
    try:
        place.until(lambda: place.shown(job_id)["Restarts"] == "1")
        place.until_completed_again(job_id)
    finally:
        subprocess.run([CLUSTER, "node-start", node], env=place.environment, check=True)
    assert (place.run / "submit/bad-nodes").read_text().startswith(f"{node} Slurm says DOWN")
    assert node not in json.loads((place.run / "submit/starts.jsonl").read_text().splitlines()[-2])["nodes"]
    assert f"{node} let this run down" in place.logs() and len(place.told(1)) == 4
    place.until_in_service(node)


# The second node of the first start finds no room on its disk, now and for good.
SICK = """    sick = folder.parent / "sick"
    if os.environ["SLURM_NODEID"] == "1" and not sick.exists():
        sick.write_text(surroundings.node)
    if sick.exists() and sick.read_text() == surroundings.node:
        report["room"] = 0.25
"""


@both_ways
def test_a_bad_node_is_left_out_before_the_ranks_start(place, way):
    place.run.mkdir(mode=0o700)
    probe = place.source / "hpcpar/probe.py"
    before, after = probe.read_text().split("    _leave(folder, surroundings.node, report)\n", 1)
    probe.write_text(before + SICK + "    _leave(folder, surroundings.node, report)\n" + after)
    job_id = start(place, way)
    place.until_state(job_id, "PENDING")
    assert not place.told()
    place.until_completed_again(job_id)
    node = (place.run / "submit/sick").read_text()
    assert f"requeued without {node}" in place.logs() and len(place.told()) == 4
    assert (place.run / "submit/bad-nodes").read_text().startswith(f"{node} 0.25 GiB are free on its own disk")
    starts = [json.loads(line) for line in (place.run / "submit/starts.jsonl").read_text().splitlines()]
    assert [node in line["nodes"] for line in starts if "nodes" in line] == [True, False]


# The first time, rank 2 is killed in step 3, as its host's witness would tell it.
ABORTING = """
import os, time
def main(words):
    if os.environ["SLURM_PROCID"] == "2" and int(os.environ.get("SLURM_RESTART_COUNT", 0)) < TIMES:
        os.abort()
    time.sleep(1)
    return 0
"""
DYING = """
import json, os, pathlib, sys, time
def main(words):
    from mpi4py import MPI
    run = pathlib.Path(words[words.index("--run") + 1])
    again = (run / "failure.json").exists()
    MPI.COMM_WORLD.Barrier()
    if again:
        return 0
    if MPI.COMM_WORLD.rank == 2:
        told = {"rank": 2, "step": STEP, "error": "Died", "message": "killed by SIGKILL"}
        (run / "failure.json").write_text(json.dumps(told))
        os._exit(9)
    time.sleep(60)
"""


@both_ways
def test_the_node_of_a_dead_rank_is_named_and_not_used_again(place, way):
    (place.source / "hpcpar/cli.py").write_text(DYING.replace("STEP", "3"))
    job_id = start(place, way)
    place.until(lambda: place.shown(job_id)["Restarts"] == "1")
    second = json.loads((place.run / "submit/starts.jsonl").read_text().splitlines()[0])["nodes"][1]
    place.until_completed_again(job_id)
    assert (place.run / "submit/bad-nodes").read_text() == f"{second} rank 2: killed by SIGKILL\n"
    assert place.shown(job_id)["ExcNodeList"] == second and f"{second} let this run down" in place.logs()
    again = json.loads((place.run / "submit/starts.jsonl").read_text().splitlines()[2])
    assert again["restart"] == 1 and len(again["nodes"]) == 2 and second not in again["nodes"]


@pytest.mark.parametrize("times", [1, 2])
def test_a_crash_before_any_rank_could_speak_is_tried_once_more(place, times):
    """As in the start of MPI: a rank aborts, and srun kills the others."""
    place.run.mkdir()
    (place.source / "hpcpar/cli.py").write_text(ABORTING.replace("TIMES", str(times)))
    job_id = place.submit()
    place.until(lambda: place.shown(job_id)["Restarts"] == "1")
    assert "ended before any rank could say why; tried once more" in place.logs()
    place.until_completed_again(job_id, state="COMPLETED" if times == 1 else "FAILED")
    assert ("failed before its first step; not requeued" in place.logs()) == (times == 2)
    assert place.shown(job_id)["Restarts"] == "1" and not (place.run / "submit/bad-nodes").exists()


def test_a_run_that_saves_nothing_new_is_given_up(place):
    (place.source / "hpcpar/cli.py").write_text(DYING.replace("STEP", "3"))
    job_id = place.submit(["--submit.retries", "0"])
    place.until_state(job_id, "FAILED")
    assert "1 starts in a row have saved nothing new; not requeued" in place.logs()


def test_a_sweep_is_an_array_of_runs_split_where_slurm_wants_it(place):
    ids = place.submit(request="sweep=('train.seed=1,2', 'optim.lr=1e-4,3e-4')").split()
    first, last = ids[0].split("_")[0], ids[-1]
    assert ids == [f"{first}_0", f"{first}_1", f"{first}_2", last] and "_" not in last  # MaxArraySize is 3
    runs = [f"train.seed={seed}_optim.lr={lr}" for seed in (1, 2) for lr in ("1e-4", "3e-4")]
    place.until(lambda: all((place.run / run / "told-3-0.json").exists() for run in runs))
    for run in runs:
        told = json.loads((place.run / run / "told-0-0.json").read_text())
        assert told["words"] == ["train", f"{place.run}/{run}/submit/job.toml", "--run", f"{place.run}/{run}"]
        swept = load_job(place.run / run / "submit/job.toml")
        assert f"train.seed={swept.train.seed}_optim.lr={swept.optim.lr:.0e}".replace("-0", "-") == run
        assert (place.run / run).stat().st_mode & 0o777 == 0o700
    place.until_state(last, "COMPLETED")


def test_only_the_element_of_an_array_that_wants_to_go_on_is_requeued(place):
    """The last element has the array's own number, by which Slurm would mean all of them."""
    waits = place.run / "train.seed=2"
    waits.mkdir(mode=0o700, parents=True)
    place.run.chmod(0o700)
    (waits / "wait").touch()
    first, last = place.submit(request="sweep=('train.seed=1,2',)").split()
    place.until_state(first, "COMPLETED")
    place.until(lambda: len(list(waits.glob("told-*-0.json"))) == 4)
    place.call("scancel", "--signal=USR2", last)
    place.until(lambda: place.shown(last)["Restarts"] == "1")
    place.until_completed_again(last)
    assert len(list(waits.glob("told-*-1.json"))) == 4 and place.state(first) == "COMPLETED"
    assert not list((place.run / "train.seed=1").glob("told-*-1.json"))


def test_a_job_waits_for_the_one_that_it_depends_on(place):
    place.run.mkdir(mode=0o700)
    (place.run / "wait").touch()
    first = place.submit()
    second = place.call(sys.executable, "-c", "import os, pathlib; from hpcpar.submit.slurm import Request, submit\n"
                        f"print(submit(pathlib.Path('job.toml'), [], pathlib.Path('next'), os.environ, "
                        f"Request(depend='{first}')).job_id)").strip()
    assert place.shown(second)["Dependency"].startswith(f"afterany:{first}")
    place.until(lambda: len(place.told()) == 4)
    with pytest.raises(AssertionError, match=rf"job {first} runs in it; give --depend {first}"):
        place.submit()
    place.call("scancel", first, second)
    place.until_state(first, "CANCELLED")


def test_a_second_job_in_a_folder_that_one_waits_for_is_refused(place):
    place.call("scontrol", "update", "partitionname=main", "state=down")
    try:
        waiting = place.submit()
        with pytest.raises(AssertionError, match=rf"job {waiting} is to run in it \(pending\)"):
            place.submit()
        place.call("scancel", waiting)
        place.until_state(waiting, "CANCELLED")
        place.call("scancel", place.submit())
    finally:
        place.call("scontrol", "update", "partitionname=main", "state=up")


def test_an_elastic_job_takes_fewer_nodes_at_a_legal_dp(place):
    for node in ("node1", "node3"):
        place.call("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    try:
        job_id = place.submit(["--machine.nodes", "3", "--submit.elastic", "true", "--layout.dp", "3",
                               "--train.global_batch", "6"])
        place.until_state(job_id, "COMPLETED")
    finally:
        for node in ("node1", "node3"):
            place.call("scontrol", "update", f"nodename={node}", "state=resume")
    assert [rank["world"] for rank in place.told()] == [WORLD] * 4, place.logs()
    assert place.told()[0]["words"][-2:] == ["--layout.dp", "2"] and "elastic: 2 of 3 nodes: dp 2 instead of 3" in \
        place.logs()


def test_a_requeued_elastic_job_starts_on_the_nodes_that_are_left(place):
    place.until_in_service("node1", "node2", "node3", "node4")
    place.run.mkdir(mode=0o700)
    (place.run / "wait").touch()
    job_id = place.submit(["--machine.nodes", "3", "--submit.elastic", "true", "--layout.dp", "3",
                           "--train.global_batch", "6"])
    place.until(lambda: len(place.told()) == 6)
    first = place.shown(job_id)["NodeList"]
    try:
        for node in ("node3", "node4"):
            place.call("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
        place.call("scancel", "--signal=USR2", job_id)
        place.until_state(job_id, "PENDING")
        place.until_completed_again(job_id)
    finally:
        for node in ("node3", "node4"):
            place.call("scontrol", "update", f"nodename={node}", "state=resume")
    assert first == "node[1-3]" and place.shown(job_id)["NodeList"] == "node[1-2]", place.logs()
    assert len(place.told(1)) == 4 and place.told(1)[0]["words"][-2:] == ["--layout.dp", "2"], place.logs()


def test_what_lies_in_the_run_folder_is_private_and_holds_no_secret(place):
    place.environment["HF_TOKEN"] = "hf_do_not_write_me_down"
    place.environment["FROM_THE_SHELL"] = "yes"
    (place.source / "hpcpar/cli.py").write_text("import os, pathlib, sys\ndef main(words):\n"
                                                "    run = pathlib.Path(words[words.index('--run') + 1])\n"
                                                "    assert os.environ['HF_TOKEN'] and os.environ['FROM_THE_SHELL']\n")
    job_id = place.submit()
    place.until_state(job_id, "COMPLETED")
    written = [path for path in place.run.rglob("*") if path.is_file()]
    assert len(written) > 50 and not [path for path in written if b"hf_do_not" in path.read_bytes()]
    assert place.run.stat().st_mode & 0o777 == (place.run / "submit").stat().st_mode & 0o777 == 0o700
    pickled = (place.run / f"submit/{job_id}_submitted.pkl").read_bytes()
    named = {(op.name, arg) for op, arg, _ in pickletools.genops(pickled) if isinstance(arg, str)}
    classes = {"submitit.core.utils", "DelayedSubmission", "hpcpar.submit.tasks", "TrainTask"}
    attributes = {"function", "args", "kwargs", "run", "_result", "_done", "_timeout_min", "_timeout_countdown"}
    assert {arg for _, arg in named} - classes - attributes == {str(place.run)}  # a path only
    task = pickle.loads(pickled)
    assert task.function == TrainTask(str(place.run)) and task.args == () and task.kwargs == {}


def test_a_pickle_that_others_can_write_is_not_loaded(place):
    sleep = place.call("sbatch", "--parsable", "--wrap", "sleep 3").strip()
    job_id = place.submit(request=f"depend='{sleep}'")
    (place.run / f"submit/{job_id}_submitted.pkl").chmod(0o666)
    place.until_state(job_id, "FAILED")
    assert "can be written by others" in place.logs() and not place.told()


def test_the_environment_is_unpacked_once_a_node_and_used(place):
    """A small environment that finds its packages in ours; all four nodes' disks are one here."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place.folder / "venv"], check=True)
    site = next((place.folder / "venv").glob("lib/python3*/site-packages"))
    (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (place.source / "hpcpar/cli.py").write_text("import os, pathlib, sys\ndef main(words):\n"
                                                "    run = pathlib.Path(words[words.index('--run') + 1])\n"
                                                "    (run / os.environ['SLURM_PROCID']).write_text(sys.prefix)\n")
    local = place.folder / "disk"
    place.environment |= {"USER": "me", "SCRATCH": str(local)}
    job_id = place.call(place.folder / "venv/bin/python", "-c", "import os, pathlib\n"
                        "from hpcpar.submit.slurm import submit\n"
                        "print(submit(pathlib.Path('job.toml'), ['--submit.stage_env', "
                        "'$SCRATCH'], pathlib.Path('run'), os.environ).job_id)").strip()
    place.until_state(job_id, "COMPLETED")
    unpacked, = (local / "hpcpar-me").iterdir()
    assert unpacked.name == next((place.folder / ".environments").iterdir()).stem
    assert {(place.run / str(rank)).read_text() for rank in range(4)} == {str(unpacked)}


@pytest.mark.parametrize(("words", "said"), [
    (["--machine.nodes", "5", "--layout.dp", "5", "--train.global_batch", "5"],
     "machine.nodes: 5 nodes are needed; partition main has 4;"),
    (["--submit.cpus_per_task", "9"],
     "cpus_per_task: 2 nodes are needed; partition main has 4, of which 0 have 2 x 9 = 18 cores; 2 nodes have 16 each"),
    (["--machine.gpu", "h100-80g", "--machine.gpus_per_node", "9", "--layout.dp", "9", "--train.global_batch", "9"],
     "gpus_per_node: 2 nodes are needed; partition main has 4, of which 0 have 9 GPUs; 2 nodes have 8 each"),
    (["--submit.partition", "shrt"], r"partition: shrt is not a partition here; did you mean short\?"),
    (["--submit.partition", "short", "--submit.walltime_min", "11"], r"walltime_min: 11 minutes, but short gives 10"),
    (["--submit.partition", "short", "--machine.nodes", "4", "--layout.dp", "4"],
     "machine.nodes: 4, but partition short gives a job 3"),
    (["--submit.exclude", "node1,node2,node4"],
     "exclude: 2 nodes are needed; partition main has 4, of which 1 are not excluded"),
    (["--submit.constraint", "a100"], "constraint: 2 nodes are needed; partition main has 4, of which 0 have a100"),
])
def test_what_the_partition_cannot_give_is_refused_with_numbers(place, monkeypatch, words, said):
    monkeypatch.setenv("SLURM_CONF", place.environment["SLURM_CONF"])
    with pytest.raises(UserError, match=said):
        submit(place.folder / "job.toml", words, place.run, {"PATH": os.environ["PATH"]})
    assert not place.run.exists()
