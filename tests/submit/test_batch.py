"""What a batch script does before its ranks start, with a Slurm that answers from here."""

import subprocess

import pytest

from hpcpar.submit import ask
from hpcpar.submit.batch import Batch
from hpcpar.submit.requeue import follow_up

START = {"job": "7", "restart": 0, "nodes": ["node1", "node2"]}
STAYS = {"job": "7", "end": 0, "stays": "the job is COMPLETING; not requeued"}
ANSWERS = {"hostnames": "node1\nnode3\n", "node": "NodeName=node1 State=IDLE\nNodeName=node2 State=DOWN Reason=dead\n"}


@pytest.mark.parametrize(("lines", "job", "lost"), [
    ([START], "7", ["node2"]),  # the script's node was lost too
    ([START, STAYS], "7", ["node2"]),  # it was not
    ([START, {"job": "7", "end": 1}], "7", []),  # we requeued it
    ([START, STAYS], "8", []),  # a later job: what its nodes did meanwhile is not this run's matter
    ([START, {"job": "7", "unfit": ["node1"]}], "7", []),
    ([START, {"job": "7", "heir": "node3"}], "7", ["node2"]),  # another node acted for the script's; more may be lost
])
def test_nodes_of_a_start_that_slurm_ended_are_looked_at(tmp_path, monkeypatch, lines, job, lost):
    monkeypatch.setattr(ask, "slurm", lambda *words: next((ANSWERS[what] for what in ANSWERS if what in words), None))
    batch = Batch(tmp_path / "run", {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "node[1,3]"})
    batch.starts.folder.create()
    batch.starts.folder.submission.mkdir(mode=0o700)
    (batch.starts.folder.submission / "job.toml").write_text("")
    for line in lines:
        batch.starts.note(**line)
    batch.start(None)
    assert list(batch.starts.bad_nodes()) == lost


def test_the_ranks_are_told_how_mpi_talks(tmp_path, monkeypatch):
    monkeypatch.setattr("hpcpar.config.surroundings.distributions", lambda name: [name])
    monkeypatch.setattr(ask, "slurm", lambda *words: ANSWERS["hostnames"] if "hostnames" in words else None)
    batch = Batch(tmp_path / "run", {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1,3]"})
    assert batch.start(None) == "export MPIR_CVAR_CH4_NETMOD=ofi\nexport FI_PROVIDER='^sockets'"


@pytest.mark.parametrize(("code", "says"), [
    (134, ""),  # a rank aborted
    (143, ""),  # beside it srun ended one that had not yet begun to heed signals
    (140, "failed before its first step; not requeued"),  # somebody stopped it by USR2
    (2, "it would fail again in the same way; not requeued"),
])
def test_a_start_that_could_not_say_why_it_ended_is_tried_once_more(tmp_path, monkeypatch, code, says):
    monkeypatch.setattr(ask, "slurm", lambda *words: ANSWERS["hostnames"] if "hostnames" in words else None)
    batch = Batch(tmp_path / "run", {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1,3]"})
    batch.start(None)
    assert batch._why_not_again(code, False, "RUNNING", batch.starts.began(), {}) == says


def test_a_follow_up_starts_where_the_first_did_at_the_dp_of_its_own_nodes(tmp_path, monkeypatch):
    shown = "JobId=7 JobState=RUNNING NumNodes=2 Partition=main TimeLimit=01:00:00 WorkDir=/home/me/project"
    monkeypatch.setattr(ask, "slurm", lambda *words: shown if "job" in words else "")
    started = []

    def run(command, env, **_):
        started.append((command, env))
        return subprocess.CompletedProcess(command, 0, "9\n", "")

    monkeypatch.setattr("hpcpar.submit.requeue.subprocess.run", run)
    environment = {"SLURM_JOB_ID": "7", "HPCPAR_DP": "2", "HOME": "/home/me", "HPCPAR_PICKLES": str(tmp_path)}
    batch = Batch(tmp_path / "run", environment)
    assert follow_up(environment, batch.starts, (), keep_nodes=True) == \
        "requeue refused; job 9 goes on when this one has ended"
    (command, environment), = started
    assert "--chdir=/home/me/project" in command and "--dependency=afterany:7" in command
    assert environment == {"HOME": "/home/me", "HPCPAR_PICKLES": str(tmp_path), "RUN": str(tmp_path / "run")}
