"""What another node does where the batch script's is lost, with a Slurm that answers from here."""

import signal
import socket

import pytest

from hpcpar.submit import ask
from hpcpar.submit.heir import Heir

START = {"job": "7", "restart": 0, "nodes": ["node1", "node2"]}
ENDS = {"job": "7", "end": 137}
LOST = {"node1": "lost, and the batch script with it"}
REQUEUE, EXCLUDE = "scontrol requeue 7", "scontrol update jobid=7 excnodelist=node1"


@pytest.fixture
def srun():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.mark.parametrize(("lines", "srun_lives", "state", "node", "asks"), [
    ([START], False, "RUNNING", "ALLOCATED", [REQUEUE, EXCLUDE]),
    ([START], False, "COMPLETING", "DOWN*", [REQUEUE, EXCLUDE]),  # Slurm was quicker: refused, but it does requeue
    ([START], False, "COMPLETING", "IDLE", []),  # cancelled
    ([START], True, "RUNNING", "ALLOCATED", []),  # a rank failed, and the batch script will see to it
    ([START, ENDS], False, "RUNNING", "ALLOCATED", []),  # srun is gone, for the batch script has come to its end
    ([START, ENDS, {**START, "job": "8"}], False, "RUNNING", "ALLOCATED", []),
    ([], False, "RUNNING", "ALLOCATED", []),  # srun was started by hand
    ([START] * 5, False, "RUNNING", "ALLOCATED", []),  # submit.retries (3) starts have saved nothing
])
def test_another_node_acts_where_the_batch_scripts_is_lost(tmp_path, monkeypatch, srun, lines, srun_lives, state, node,
                                                            asks):
    heir, asked = make_heir(tmp_path, monkeypatch, srun, lines, {"JobState": state}, node,
                            "nothing" if state == "RUNNING" else "requeue")
    if not srun_lives:
        srun.close()
    heir.inherit()
    assert asked == asks and heir.starts.bad_nodes() == (LOST if asks else {})
    told = [(line["heir"], line["does"]) for line in heir.starts.lines() if "heir" in line]
    assert told == [("node2", "requeued")] * bool(asks)


def test_a_run_that_was_told_to_stop_stays(tmp_path, monkeypatch, srun):
    heir, asked = make_heir(tmp_path, monkeypatch, srun)
    srun.close()
    heir.starts.folder.stop.touch()
    heir.inherit()
    assert asked == []


def test_one_node_acts_at_each_start_and_the_others_wait_for_it(tmp_path, monkeypatch, srun):
    heir, asked = make_heir(tmp_path, monkeypatch, srun)
    srun.close()
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            heir.starts.heir.write_text("requeued")

    monkeypatch.setattr("hpcpar.submit.heir.time.sleep", sleep)
    heir.starts.heir.touch()
    heir.inherit()
    assert asked == [] and waits == [0.0, 0.2, 0.2]  # the first is for a script that lives
    heir.batch.start(None)  # of the requeued job
    heir.starts.note(**START)
    waits.clear()
    monkeypatch.setattr("hpcpar.submit.heir.time.sleep", waits.append)
    heir.inherit()
    assert asked[0] == REQUEUE and heir.starts.heir.read_text() == "requeued"


@pytest.mark.parametrize(("state", "requeue"), [("RUNNING", "1"), ("COMPLETING", "0")])
def test_where_requeue_is_refused_a_follow_up_is_submitted(tmp_path, monkeypatch, srun, state, requeue):
    heir, asked = make_heir(tmp_path, monkeypatch, srun, fields={"JobState": state, "Requeue": requeue}, node="DOWN",
                            refused="requeue")
    srun.close()
    followed = []
    monkeypatch.setattr("hpcpar.submit.heir.follow_up", lambda *words, keep_nodes: followed.append(words) or "followed")
    heir.inherit()
    assert asked == [REQUEUE] and followed == [(heir.environment, heir.starts, ())]
    assert heir.starts.lines()[-1]["does"] == "followed"


def make_heir(tmp_path, monkeypatch, srun, lines=(START,), fields=None, node="ALLOCATED", refused="nothing"):
    """Return another node as it is after the start, and the list of what it asks Slurm to do."""
    asked, fields = [], fields or {"JobState": "RUNNING"}
    answers = {"job": " ".join(f"{name}={value}" for name, value in fields.items()), "hostnames": "node1\nnode2\n",
               "node": f"NodeName=node1 State={node}\n"}

    def slurm(*words):
        if words[1] in ("requeue", "update"):
            asked.append(" ".join(words))
            return None if words[1] == refused else ""
        return next((answers[what] for what in answers if what in words), None)

    monkeypatch.setattr(ask, "slurm", slurm)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process goes on to heed SIGTERM
    monkeypatch.setattr("hpcpar.submit.heir.WRITES_ITS_END_S", 0.0)
    host, port = srun.getsockname()
    heir = Heir(tmp_path / "run", {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURMD_NODENAME": "node2",
                                   "SLURM_SRUN_COMM_HOST": host, "SLURM_SRUN_COMM_PORT": str(port)})
    heir.starts.folder.create()
    heir.starts.folder.submission.mkdir(mode=0o700)
    heir.starts.job.write_text("")
    for line in lines:
        heir.starts.note(**line)
    return heir, asked


def test_of_an_array_one_element_is_meant():
    environment = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}  # the last one's
    assert ask.own_id(environment) == "7_3" and ask.own_id({"SLURM_JOB_ID": "8"}) == "8"
