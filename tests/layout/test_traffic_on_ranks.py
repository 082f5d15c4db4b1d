"""What the layout says a rank will call is what its ranks ask of MPI: operation, group, order, bytes."""

from __future__ import annotations

from collections import defaultdict

import pytest

from hpcpar.comm import mpi_backend
from hpcpar.comm.groups import open_groups
from hpcpar.config.ramp import batch_size
from hpcpar.layout.layout import Layout
from hpcpar.layout.traffic import Call, Traffic
from hpcpar.parallel.build import build, initialise
from hpcpar.train.state import Progress
from hpcpar.train.step import Trainee, train_step
from tests.parity.jobs import all_pairs, job_of, name_of, random_tokens

pytestmark = pytest.mark.mpi
EIGHT = [c for c in all_pairs() if c["mesh"][0] * c["mesh"][1] * c["mesh"][2] == 8][::4]
CHUNKED = [{**EIGHT[0], "mesh": mesh, "schedule": schedule, "zero": zero, "recompute": "none"}
           for mesh, schedule, zero in
           [((2, 2, 2), "interleaved", 3), ((1, 4, 2), "zbv", 2), ((2, 4, 1), "dualpipev", 1),
            ((1, 2, 4), "breadth-first", 2), ((2, 2, 2), "zero-bubble", 3), ((1, 2, 4), "dualpipev", 3),
            ((1, 2, 4), "1f1b", (1, 2)), ((2, 1, 4), "1f1b", (2, 2)), ((1, 2, 4), "zero-bubble", (3, 2)),
            ((1, 1, 8), "1f1b", (3, 8))]]

IN_PIECES = [{**EIGHT[0], "mesh": (2, 2, 2), "sequence_parallel": True, "tp_overlap": 2, "recompute": recompute,
              "dropout": 0.0, "zero": 1} for recompute in ("none", "selective", "full")]


@pytest.fixture
def issued(monkeypatch):
    """Record at the wires themselves, beneath every function that could make a call."""
    calls: list[Call] = []

    def spy(name, record):
        original = getattr(mpi_backend.MPIProcessGroup, name)

        def recorded(self, *args):
            calls.append(record({"default_pg": "everyone"}.get(self.getGroupDesc(), self.getGroupDesc()), *args))
            return original(self, *args)

        monkeypatch.setattr(mpi_backend.MPIProcessGroup, name, recorded)

    spy("allreduce", lambda group, tensors, *_: Call("all_reduce", group, tensors[0].nbytes))
    for name in ("_allgather_base", "all_gather_single"):
        spy(name, lambda group, whole, part, *_: Call("all_gather", group, whole.nbytes))
    for name in ("_reduce_scatter_base", "reduce_scatter_single"):
        spy(name, lambda group, part, whole, *_: Call("reduce_scatter", group, whole.nbytes))
    spy("send", lambda group, tensors, peer, tag: Call("send", group, tensors[0].nbytes, peer))
    spy("recv", lambda group, tensors, peer, tag: Call("receive", group, tensors[0].nbytes, peer))
    for name in ("broadcast", "reduce", "allgather", "reduce_scatter", "gather", "scatter", "alltoall",
                 "alltoall_base", "barrier", "recv_anysource"):
        spy(name, lambda group, *_, name=name: Call(name, group, 0))
    return calls


def by_group(calls):
    found = defaultdict(list)
    for call in calls:
        found[call.group].append(call)
    return dict(found)


def test_a_loss_in_chunks_issues_exactly_these_calls(world, issued, monkeypatch, request):
    monkeypatch.setattr("hpcpar.layout.loss.LEAST_TOKENS", 3)
    monkeypatch.setattr("hpcpar.layout.loss.CHUNK_BYTES", 1)
    test_a_step_issues_exactly_these_calls(world, issued, {**CHUNKED[0], "mesh": (4, 2, 1), "zero": 1}, request)


@pytest.mark.parametrize("choice", EIGHT + CHUNKED + IN_PIECES, ids=name_of)
def test_a_step_issues_exactly_these_calls(world, issued, choice, request):
    """Where memory holds the weights of ZeRO 3 in common, their all-gathers fall away."""
    if choice["zero"] in (3, (3, 2), (3, 8)):
        request.getfixturevalue("apart")
    layout = Layout(job_of(choice))
    groups = open_groups(layout.mesh, world.rank)
    pipeline, optimizer = build(layout, groups, world.device)
    initialise(optimizer, 1)
    issued.clear()
    train_step(Trainee(layout, groups, pipeline, optimizer, world.device), Progress(),
               random_tokens(choice["vocab"], 8))
    num_microbatches = batch_size(layout.job, 0) // (layout.mesh.dp_size * layout.job.train.microbatch)
    foretold = Traffic(layout, groups.at).step(layout.program(groups.at.pp_rank, num_microbatches))
    groups.close()
    assert by_group(issued) == by_group(foretold)
    assert len(issued) == len(foretold) > 2
