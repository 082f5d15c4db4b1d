"""What a batch script does before its ranks start, with a Slurm that answers from here."""

import signal
import socket

import pytest

from hpcpar.submit import ask
from hpcpar.submit.batch import Batch

START = {"job": "7", "restart": 0, "nodes": ["node1", "node2"]}
STAYS = {"job": "7", "end": 0, "stays": "the job is COMPLETING; not requeued"}
ANSWERS = {"hostnames": "node1\nnode3\n", "node": "NodeName=node1 State=IDLE\nNodeName=node2 State=DOWN Reason=dead\n"}


@pytest.mark.parametrize(("lines", "job", "lost"), [
    ([START], "7", ["node2"]),  # the script's node was lost too
    ([START, STAYS], "7", ["node2"]),  # it was not
    ([START, {"job": "7", "end": 1}], "7", []),  # we requeued it
    ([START, STAYS], "8", []),  # a later job: what its nodes did meanwhile is not this run's matter
    ([START, {"job": "7", "unfit": ["node1"]}], "7", []),
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


@pytest.fixture
def srun():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


ENDS = {"job": "7", "end": 137}
LOST = {"node1": "lost, and the batch script with it"}


REQUEUE, EXCLUDE = "scontrol requeue 7", "scontrol update jobid=7 excnodelist=node1"


@pytest.mark.parametrize(("lines", "srun_lives", "state", "node", "asks"), [
    ([START], False, "RUNNING", "ALLOCATED", [REQUEUE, EXCLUDE]),
    ([START], False, "COMPLETING", "DOWN*", [EXCLUDE]),  # Slurm was quicker
    ([START], False, "COMPLETING", "IDLE", []),  # cancelled
    ([START], True, "RUNNING", "ALLOCATED", []),  # a rank failed, and the batch script will see to it
    ([START, ENDS], False, "RUNNING", "ALLOCATED", []),  # srun is gone, for the batch script has come to its end
    ([START, ENDS, {**START, "job": "8"}], False, "RUNNING", "ALLOCATED", []),
    ([], False, "RUNNING", "ALLOCATED", []),  # srun was started by hand
])
def test_another_node_requeues_where_the_batch_scripts_is_lost(tmp_path, monkeypatch, srun, lines, srun_lives, state,
                                                                node, asks):
    batch, asked = orphan(tmp_path, monkeypatch, srun, lines, {"JobState": state}, node=node)
    if not srun_lives:
        srun.close()
    batch.inherit()
    assert asked == asks and batch.starts.bad_nodes() == (LOST if asks else {})
    assert [line["heir"] for line in batch.starts.lines() if "heir" in line] == ["node2"] * bool(asks)


def test_one_node_acts_for_the_lost_one_at_each_start(tmp_path, monkeypatch, srun):
    batch, asked = orphan(tmp_path, monkeypatch, srun, [START], {"JobState": "RUNNING"})
    srun.close()
    batch.starts.heir.touch()
    batch.inherit()
    assert asked == []
    batch.start(None)
    batch.starts.note(**START)
    batch.inherit()
    assert asked[0] == "scontrol requeue 7"


def test_where_requeue_is_refused_the_other_node_submits_a_follow_up(tmp_path, monkeypatch, srun):
    batch, asked = orphan(tmp_path, monkeypatch, srun, [START], {"JobState": "RUNNING"}, refused="requeue")
    srun.close()
    followed = []
    monkeypatch.setattr("hpcpar.submit.batch.follow_up", lambda *words, keep_nodes: followed.append(words))
    batch.inherit()
    assert asked == ["scontrol requeue 7"] and followed == [(batch.environment, batch.starts, ())]


def orphan(tmp_path, monkeypatch, srun, lines, fields, refused="nothing", node="ALLOCATED"):
    """Return a batch as another node knows it after its start, and the list of what it asks Slurm to do."""
    asked = []

    def slurm(*words):
        if words[1] in ("requeue", "update"):
            asked.append(" ".join(words))
            return None if words[1] == refused else ""
        shown = " ".join(f"{name}={value}" for name, value in fields.items())
        return next((answer for what, answer in {"job": shown, "hostnames": "node1\nnode2\n",
                                                    "node": f"NodeName=node1 State={node}\n"}.items()
                     if what in words), None)

    monkeypatch.setattr(ask, "slurm", slurm)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process goes on to heed SIGTERM
    monkeypatch.setattr("hpcpar.submit.batch.WRITES_ITS_END_S", 0.0)
    host, port = srun.getsockname()
    batch = Batch(tmp_path / "run", {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURMD_NODENAME": "node2",
                                     "SLURM_SRUN_COMM_HOST": host, "SLURM_SRUN_COMM_PORT": str(port)})
    batch.starts.folder.create()
    batch.starts.folder.submission.mkdir(mode=0o700)
    batch.starts.job.write_text("")
    for line in lines:
        batch.starts.note(**line)
    return batch, asked
