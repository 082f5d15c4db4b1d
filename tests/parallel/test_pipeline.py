"""The executor plays every schedule: the stages as threads of one process, against the whole network."""

from __future__ import annotations

import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from hpcpar.comm.groups import Groups
from hpcpar.config.load import job_from_tables
from hpcpar.config.resolve import resolve
from hpcpar.layout.layout import Layout
from hpcpar.layout.mesh import Coordinates
from hpcpar.layout.schedule import Action, Kind
from hpcpar.nn.init import initial_values
from hpcpar.nn.transformer import Transformer
from hpcpar.parallel.build import build, initialise
from hpcpar.parallel.pipeline import Microbatch, Pipeline, Played
from hpcpar.parallel.zero import ShardedOptimizer

CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "breadth-first": 3, "zero-bubble": 1, "zbv": 2, "dualpipev": 2}
CPU = torch.device("cpu")


class Wires:
    """Messages as MPI matches them: between two ranks the n-th receive posted in a direction gets the n-th message."""

    def __init__(self) -> None:
        self.arrived = threading.Condition()
        self.messages: dict[Any, list[tuple[Action, Tensor]]] = defaultdict(list)

    def neighbours(self, rank: int, chunk_ranks: tuple[int, ...]) -> Any:
        wires, posted = self, defaultdict(int)

        class Incoming:
            def __init__(self, channel: Any, number: int, action: Action):
                self.channel, self.number, self.action = channel, number, action

            def wait(self) -> Tensor:
                with wires.arrived:
                    assert wires.arrived.wait_for(lambda: len(wires.messages[self.channel]) > self.number, timeout=20)
                sent, x = wires.messages[self.channel][self.number]
                step = 1 if sent.kind is Kind.SEND_FORWARD else -1
                assert (sent.microbatch, sent.chunk + step) == (self.action.microbatch, self.action.chunk)
                return x.clone()

        class Ends:
            def send(self, action: Action, x: Tensor) -> None:
                peer = chunk_ranks[action.chunk + (1 if action.kind is Kind.SEND_FORWARD else -1)]
                with wires.arrived:
                    wires.messages[action.kind.value[1], rank, peer].append((action, x.detach().clone()))
                    wires.arrived.notify_all()

            def post_receive(self, action: Action, shape: tuple[int, ...]) -> Incoming:
                peer = chunk_ranks[action.chunk + (-1 if action.kind is Kind.RECEIVE_FORWARD else 1)]
                channel = action.kind.value[1], peer, rank
                posted[channel] += 1
                return Incoming(channel, posted[channel] - 1, action)

            def wait_sends(self) -> None:
                pass

        return Ends()


def small_job(pp: int, num_microbatches: int, tied: bool = False, **layout: Any) -> Layout:
    chunks = layout.get("chunks", 1)
    return Layout(resolve(job_from_tables({
        "model": {"kind": "gpt", "layers": pp * chunks + 1, "hidden": 16, "heads": 2, "seq": 4, "vocab": 13,
                  "tied": tied, "init_std": 0.2},
        "layout": {"pp": pp, "bucket_mib": 0.005, **layout},
        "train": {"global_batch": num_microbatches, "precision": "fp64"},
    })))


def microbatch(m: int) -> Microbatch:
    rows = torch.randint(13, (1, 5), generator=torch.Generator().manual_seed(m))
    return Microbatch(rows[:, :-1], rows[:, 1:])


def play_stages(layout: Layout, program: Any) -> list[tuple[Pipeline, ShardedOptimizer, Played]]:
    """Play a step on all stages at once; `program(pp_rank)` is what each plays."""
    wires, num = Wires(), layout.num_microbatches

    def stage(pp_rank: int) -> tuple[Pipeline, ShardedOptimizer, Played]:
        groups = Groups(layout.mesh, Coordinates(pp_rank, 0, 0, 0), *[None] * 6)
        pipeline, optimizer = build(layout, groups, CPU)
        initialise(optimizer, 1)
        pipeline.neighbours = wires.neighbours(pp_rank, layout.chunk_ranks)
        optimizer.begin(num)
        return pipeline, optimizer, pipeline.play(program(pp_rank), microbatch, 1, 1 / num)

    with ThreadPoolExecutor(layout.mesh.pp_size) as pool:
        return list(pool.map(stage, range(layout.mesh.pp_size)))


def whole_network(layout: Layout) -> tuple[Transformer, list[float]]:
    """Compute a step's gradients in one piece."""
    model, num = layout.job.model, layout.num_microbatches
    network = Transformer(model, range(model.layers), first=True, last=True).double()
    with torch.no_grad():
        for p in layout.table:
            network.get_parameter(p.name).copy_(initial_values(p, p.box(1, 0), 1, CPU))
    losses = []
    for m in range(num):
        batch = microbatch(m)
        loss = network(batch.tokens, batch.targets) / num
        loss.backward()
        losses.append(loss.item() * num)
    return network, losses


def compare(layout: Layout) -> list[tuple[Pipeline, ShardedOptimizer, Played]]:
    network, losses = whole_network(layout)
    stages = play_stages(layout, lambda pp_rank: layout.program(pp_rank, layout.num_microbatches))
    seen = set()
    for _, optimizer, _ in stages:
        assert all(g.left == 0 for g in optimizer._reduction.gradients)  # every bucket was ready for its reduction
        for flat in optimizer.buckets:
            for slot in flat.bucket.slots:
                seen.add(slot.parameter.name)
                want = network.get_parameter(slot.parameter.name).grad
                got = flat.part(flat.grads, slot)[:len(want)]  # behind the vocabulary lies padding
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert seen == {p.name for p in layout.table}
    played = sorted(loss.item() for *_, p in stages for loss in p.losses)
    assert played == pytest.approx(sorted(losses), rel=1e-12)
    return stages


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("schedule", CHUNKS)
def test_gradients_are_those_of_the_whole_network(schedule: str, pp: int) -> None:
    compare(small_job(pp, 2 * pp, schedule=schedule, chunks=CHUNKS[schedule]))


@pytest.mark.parametrize(("schedule", "recompute"), [
    ("interleaved", "selective"), ("interleaved", "full"), ("interleaved", "offload"), ("breadth-first", "offload"),
    ("zbv", "selective"), ("zbv", "full")])
def test_with_recompute(schedule: str, recompute: str) -> None:
    compare(small_job(2, 4, schedule=schedule, chunks=2, recompute=recompute))


@pytest.mark.parametrize(("schedule", "chunks", "num"), [
    ("interleaved", 2, 16), ("zero-bubble", 2, 8), ("zero-bubble", 1, 5), ("zbv", 2, 3), ("dualpipev", 2, 19),
])
def test_eight_stages(schedule: str, chunks: int, num: int) -> None:
    compare(small_job(8, num, schedule=schedule, chunks=chunks))


@pytest.mark.parametrize("schedule", ["zbv", "dualpipev"])
def test_in_a_v_a_tied_embedding_is_one_tensor_on_the_first_stage(schedule: str) -> None:
    layout = small_job(4, 8, tied=True, schedule=schedule, chunks=2)
    assert not layout.tied_across_stages
    first = compare(layout)[0][0].chunks
    assert first[0].embedding.token.weight is first[7].embedding.token.weight


def test_a_users_table() -> None:
    table = ["0F0 3F0 3B0 0F1 0I0 3F1 3I1 0W0 3W1 0B1", "(1F0;2F0)OVERLAP_F_B,,2B0,1B0,1F1,2F1,2B1,1B1"]
    compare(small_job(2, 2, schedule="table", chunks=2, table=table))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
def test_a_validation_keeps_nothing(schedule: str) -> None:
    layout = small_job(2, 6, schedule=schedule, chunks=CHUNKS[schedule])
    losses = whole_network(layout)[1]
    stages = play_stages(layout, lambda pp_rank: layout.forward_program(pp_rank, 6))
    played = [loss.item() for *_, p in stages for loss in p.losses]
    assert played == pytest.approx(losses, rel=1e-12)
    assert not any(flat.grads.any() for _, optimizer, _ in stages for flat in optimizer.buckets)


def test_events_are_the_computations_in_order_and_the_waits_before_them() -> None:
    layout = small_job(2, 4, schedule="zero-bubble")
    stages = play_stages(layout, lambda pp_rank: layout.program(pp_rank, 4))
    for pp_rank, (_, _, played) in enumerate(stages):
        names = [name for name, _, _ in played.events]
        computed = [str(action) for action in layout.schedule(4).orders[pp_rank]]
        assert [name for name in names if name in computed] == computed
        assert all(start <= end for _, start, end in played.events)
        assert names.index(f"{pp_rank}F0") == (0 if pp_rank == 0 else 1 + names.index("1rf0"))
