"""Activations that wait in the host's memory: the same gradients, each byte once either way, two layers here."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial, partialmethod
from typing import Any

import pytest
import torch
from torch import Tensor

from hpcpar.comm.groups import open_groups
from hpcpar.comm.silent_backend import silent_world
from hpcpar.config.job import Job
from hpcpar.errors import UserError
from hpcpar.layout.layout import Layout
from hpcpar.parallel.build import build, initialise
from hpcpar.parallel.offload import Copies, Kept, Offload
from hpcpar.parallel.pipeline import Microbatch, Pipeline
from hpcpar.parallel.zero import ShardedOptimizer
from hpcpar.planner.memory import layer_bytes
from tests.planner.jobs import job_of as planned

CPU = torch.device("cpu")
LAYERS = 4


def small(recompute: str, schedule: str = "1f1b", kind: str = "gpt", **train: Any) -> Job:
    """Four layers, two microbatches of two sequences."""
    return planned(LAYERS, 32, 4, 1, 1, 1, 4, model={"kind": kind, "seq": 16, "vocab": 64},
                   layout={"recompute": recompute, "schedule": schedule}, machine={"gpu": "cpu"},
                   train={"precision": "fp32", "microbatch": 2} | train)


@contextmanager
def built(job: Job, rank: int = 0) -> Iterator[tuple[Pipeline, ShardedOptimizer]]:
    layout = Layout(job)
    with silent_world(job.world_size, rank):
        groups = open_groups(layout.mesh, rank)
        pipeline, optimizer = build(layout, groups, CPU)
        initialise(optimizer, 1)
        optimizer.begin(layout.num_microbatches)
        yield pipeline, optimizer
        groups.close()


def microbatch(m: int) -> Microbatch:
    tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(m))
    return Microbatch(tokens[:, :-1], tokens[:, 1:])


def gradients(job: Job, num_microbatches: int = 2) -> list[Tensor]:
    with built(job) as (pipeline, optimizer):
        program = Layout(job).program(0, num_microbatches)
        pipeline.play(program, microbatch, 2, 0.5)
        return [flat.own_grads.clone() for flat in optimizer.buckets]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_stay_bit_by_bit(schedule: str, kind: str, precision: str) -> None:
    kept, offloaded = (gradients(small(mode, schedule, kind, precision=precision)) for mode in ("none", "offload"))
    assert all(map(torch.equal, kept, offloaded)) and any(grad.count_nonzero() for grad in kept)


class Late(Copies):
    """Copies that are made only when they are waited for, and only of what is still there then."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.bytes = 0
        self.open: set[int] = set()
        self.under_way: list[tuple[Sequence[Tensor], list[weakref.ref[Tensor]]]] = []

    def start(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Any:
        for target in targets:
            target.fill_(-1)
        assert not any(source() is None for number in self.open for source in self.under_way[number][1])
        self.open.add(len(self.under_way))
        self.bytes += sum(source.nbytes for source in sources)
        self.under_way.append((targets, [weakref.ref(source) for source in sources]))
        return len(self.under_way) - 1

    def finish(self, copied: Any) -> None:
        if copied is not None:
            self.open.remove(copied)
            targets, found = self.under_way[copied]
            sources = [source() for source in found]
            assert None not in sources, "given up before it was copied"
            super().start(targets, sources)  # type: ignore[arg-type]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[Late]:
    """Those that a run makes: out, and back."""
    made: list[Late] = []

    def make(device: torch.device) -> Late:
        made.append(Late(device))
        return made[-1]

    monkeypatch.setattr("hpcpar.parallel.offload.Copies", make)
    return made


def test_gradients_of_compiled_layers_stay(late: list[Late], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole layers, as far as needs no C++ compiler; what they keep goes out too."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    kept, offloaded = (gradients(small(mode, compile=True)) for mode in ("none", "offload"))
    assert all(map(torch.equal, kept, offloaded))
    assert late[0].bytes >= 2 * (LAYERS - 1) * layer_bytes(small("none"), "none")


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_no_copy_is_used_before_it_is_waited_for(late: list[Late], schedule: str) -> None:
    wanted, found = (gradients(small(mode, schedule)) for mode in ("none", "offload"))
    assert len(late) == 2 and all(map(torch.equal, wanted, found))


@pytest.mark.parametrize(("schedule", "stay"), [("1f1b", 2), ("gpipe", 0)])
@pytest.mark.parametrize(("kind", "more"), [("gpt", 0), ("llama", 3)])
def test_every_byte_goes_out_once_and_comes_back_once(late: list[Late], schedule: str, stay: int, kind: str,
                                                      more: int) -> None:
    """As many as the planner says a layer keeps; a backward that follows its forward finds the last layer here.

    torch's CPU kernels keep `more` of a Llama's layer: what norms have before their weight, heads in another order.
    """
    job = small("offload", schedule, kind)
    gradients(job)
    out, back = (copies.bytes for copies in late)
    statistics = (4 if kind == "gpt" else 2) * 4 * 2 * 16  # of norms, fp32 numbers a token: not in the formula
    a_layer = layer_bytes(job, "none") + statistics + more * 4 * 2 * 16 * 32
    assert out == back == (2 * LAYERS - stay) * a_layer
    assert not any(copies.open for copies in late)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_two_layers_activations_are_here_at_most(monkeypatch: pytest.MonkeyPatch, schedule: str) -> None:
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()
    seen: list[int] = []

    def watch(name: str) -> None:
        original = getattr(Kept, name)

        def watched(self: Kept, *args: Any) -> Any:
            alive.add(self)
            found = original(self, *args)
            seen.append(sum(bool(kept._here) for kept in alive))
            return found

        monkeypatch.setattr(Kept, name, watched)

    for name in ("pack", "unpack", "come_back"):
        watch(name)
    gradients(small("offload", schedule))
    assert max(seen) == 2 and not alive


def test_what_a_stage_was_sent_stays(late: list[Late]) -> None:
    """The pipeline holds it until its gradient goes out: a copy would free nothing."""
    job = planned(LAYERS, 32, 4, 1, 2, 1, 4, model={"seq": 16, "vocab": 64}, layout={"recompute": "offload"},
                  machine={"gpu": "cpu"}, train={"precision": "fp32", "microbatch": 2})
    for rank in (0, 1):
        with built(job, rank) as (pipeline, _):
            pipeline.play(Layout(job).program(rank, 2), microbatch, 2, 0.5)
    a_layer, a_message = layer_bytes(job, "none") + 4 * 4 * 2 * 16, 4 * 2 * 16 * 32
    assert late[0].bytes == 4 * a_layer
    assert late[2].bytes == 2 * (a_layer - a_message)  # its last layer stays too: a backward follows at once


def test_memory_of_the_host_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many microbatches pass: Python may be far ahead of a device."""
    made: list[int] = []
    room_for = Offload.room_for

    def counted(self: Offload, x: Tensor) -> Tensor:
        unused = len(self._rooms[len(x), x.dtype])
        made.append(0 if unused else x.nbytes)
        return room_for(self, x)

    monkeypatch.setattr(Offload, "room_for", counted)
    totals = []
    for num in (4, 8):
        made.clear()
        gradients(planned(LAYERS, 32, 4, 1, 1, 1, 2 * num, model={"seq": 16, "vocab": 64}, machine={"gpu": "cpu"},
                          layout={"recompute": "offload"}, train={"precision": "fp32", "microbatch": 2}), num)
        totals.append(sum(made))
    assert totals[0] == totals[1] > 0


def test_evaluation_keeps_nothing(late: list[Late]) -> None:
    job = small("offload")
    with built(job) as (pipeline, _):
        pipeline.play(Layout(job).forward_program(0, 2), microbatch, 2, 0.5)
    assert [copies.bytes for copies in late] == [0, 0]


def test_a_schedule_that_puts_products_off_is_refused() -> None:
    with pytest.raises(UserError, match="keeps a layer's inputs on the device between I and W") as refused:
        small("offload", "zero-bubble")
    assert refused.value.where == "layout.recompute"
