"""What is under way beside what, where exchanges over tp are in pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hpcpar.comm.groups import open_groups
from hpcpar.comm.silent_backend import SilentGroup, silent_world
from hpcpar.layout.layout import Layout
from hpcpar.nn.transformer import Block
from hpcpar.parallel.build import build
from tests.planner.jobs import job_of


class Told(dist.Work):
    """Is done when it is waited for, and tells."""

    def __init__(self, events: list[str], name: str):
        super().__init__()
        self.events, self.name = events, name

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self.events.append(f"{self.name} done")
        return True


class TellingGroup(SilentGroup):
    """Tells of every exchange."""

    def __init__(self, size: int, events: list[str]):
        super().__init__(0, size)
        self.events, self.counts = events, {"gather": 0, "sum": 0}

    def carried(self, operation: str, whole: Tensor) -> dist.Work:
        name = {"all_gather": "gather", "reduce_scatter": "sum"}[operation]
        work = Told(self.events, f"{name} {self.counts[name] % 2}")
        self.events.append(work.name)
        self.counts[name] += 1
        return work


class Products(TorchDispatchMode):
    """Tells of every matrix product that is not the attention's own."""

    def __init__(self, events: list[str]):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.events.append("product")
        return function(*args, **(kwargs or {}))


@contextmanager
def block_of_two_pieces(events: list[str]) -> Iterator[Block]:
    with silent_world(2, 0):
        layout = Layout(job_of(1, 64, 4, 2, 1, 1, 2, model={"seq": 16}, train={"precision": "fp32", "global_batch": 1},
                               layout={"tp_overlap": 2, "recompute": "none"}, machine={"gpu": "cpu"}))
        groups = open_groups(layout.mesh, 0)
        telling = dataclasses.replace(groups, tp=TellingGroup(2, events))
        pipeline, optimizer = build(layout, telling, torch.device("cpu"))
        optimizer.begin(1)
        yield pipeline.chunks[0].blocks()[0]
        groups.close()


ENTER = ["gather 0", "gather 1", "gather 0 done", *["product"] * 3, "gather 1 done", *["product"] * 3]
LEAVE = ["product", "sum 0", "product", "sum 1", "sum 0 done", "sum 1 done"]
BACK_FROM_LEAVING = ["gather 0", "gather 1", "gather 0 done", "product", "gather 1 done", "product", "product"]
BACK_FROM_ENTERING = [*["product"] * 3, "sum 0", *["product"] * 3, "sum 1", *["product"] * 3,
                      "sum 0 done", "sum 1 done"]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_piece_is_under_way_while_products_of_another_are_computed(batch: int) -> None:
    """Attention, whose three products enter together; the last three of backward are the weights'."""
    events: list[str] = []
    with block_of_two_pieces(events) as block:
        x = torch.randn(batch, 8, 64, requires_grad=True)
        with Products(events):
            out = block.attention(x, None)
            assert events == ENTER + LEAVE
            events.clear()
            out.sum().backward()
        assert events == BACK_FROM_LEAVING + BACK_FROM_ENTERING
        assert x.grad is not None and x.grad.shape == x.shape
