"""Activations wait for their backward in the host's memory: layout.recompute = "offload".

    forward     compute layer i  |  copy layer i-1 out
    backward    compute layer i  |  copy layer i-1 back

A layer stays until another is needed: its copies begin with that one and end before a third, so that the device holds
two layers' activations at most, and a slow link makes the computation wait. A backward that follows its forward at once
finds the last layer there; the first layer of any other backward stands still for its copies. Memory of the host is
used again as soon as a copy back is waited for, however far Python runs ahead of the device. A chunk's input, which the
pipeline holds anyway, stays. Source: Rhu et al. 2016, vDNN, arXiv 1602.08124.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hpcpar.nn.dropout import Draw
from hpcpar.nn.transformer import Block, Transformer


class Copies:
    """Copies between device and host in one direction, in order, beside computation where the device has streams."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> torch.cuda.Event | None:
        """Copy each source once what was launched before is done; both must stay until `finish` of the result."""
        if self._stream is None:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            event: torch.cuda.Event = self._stream.record_event()
        return event

    def finish(self, copied: torch.cuda.Event | None) -> None:
        """Let what is launched from now on begin after those copies; the host does not wait."""
        if copied is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(copied)


class Offload:
    """Runs the layers of a rank's chunks, each microbatch's activations kept on the host."""

    def __init__(self, device: torch.device):
        self.device, self.out, self.back = device, Copies(device), Copies(device)
        self.newest: Kept | None = None  # computed last, and still on the device
        self._rooms: defaultdict[tuple[int, torch.dtype], list[Tensor]] = defaultdict(list)  # of the host, unused

    def run_blocks_of(self, stage: Transformer) -> None:
        """Take the place of a stage's calls of its layers."""
        stage.run_block = partial(self._run, stage)

    def _run(self, stage: Transformer, block: Block, x: Tensor, rotary: Tensor | None, draw: Draw | None) -> Tensor:
        if not torch.is_grad_enabled():
            return block(x, rotary, draw)  # type: ignore[no-any-return]
        begins, last = block is stage.blocks()[0], self.newest
        there_anyway = [*block.parameters(), *([] if rotary is None else [rotary]),
                        *([x] if begins and not stage.first else [])]
        kept = Kept(self, None if begins else last, there_anyway)
        if last is not None:
            last.leave()
        with saved_tensors_hooks(kept.pack, kept.unpack):
            out: Tensor = block(x, rotary, draw)
        if last is not None:
            last.left()
        self.newest = kept
        return out

    def make_way(self, kept: Kept) -> None:
        """Let the layer that was computed last leave before the backward of another begins."""
        if self.newest is not None and self.newest is not kept:
            self.newest.leave()
            self.newest.left()
        self.newest = None

    def room_for(self, x: Tensor) -> Tensor:
        """Return memory of the host that x [elements] can be copied to without the host's doing."""
        unused = self._rooms[len(x), x.dtype]
        return unused.pop() if unused else torch.empty(len(x), dtype=x.dtype, pin_memory=self.device.type == "cuda")

    def take_back(self, rooms: Iterable[Tensor]) -> None:
        """Use memory of the host again, for copies that are launched from now on."""
        for room in rooms:
            self._rooms[len(room), room.dtype].append(room)


class View(NamedTuple):
    """A tensor as a look at one of its layer's regions of memory."""

    region: int
    shape: torch.Size
    stride: tuple[int, ...]


class Kept:
    """What one layer keeps of one microbatch; autograd holds it as long as it needs some of that."""

    def __init__(self, offload: Offload, before: Kept | None, there_anyway: Iterable[Tensor]):
        self._offload, self._before = offload, before
        self._there_anyway = {each.untyped_storage()._cdata for each in there_anyway}
        self._numbers: dict[tuple[object, ...], int] = {}
        self._here: list[Tensor] = []  # regions of memory, on the device; empty while they are not
        self._there: list[Tensor] = []
        self._gone: torch.cuda.Event | None = None
        self._back: torch.cuda.Event | None = None
        self._begun = False  # its backward

    def pack(self, x: Tensor) -> Tensor | View:
        """Take a tensor that autograd would keep; return what it keeps instead."""
        memory = x.untyped_storage()._cdata
        if x.device != self._offload.device or memory in self._there_anyway or not x.numel():
            return x
        span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        region = (memory, x.storage_offset(), span, x.dtype)  # the same one may be kept in several shapes
        if region not in self._numbers:
            self._numbers[region] = len(self._here)
            self._here.append(x.detach().as_strided((span,), (1,)))
        return View(self._numbers[region], x.shape, x.stride())

    def unpack(self, kept: Tensor | View) -> Tensor:
        """Give a tensor back; with the layer's first one, begin to bring those of the layer before."""
        if isinstance(kept, Tensor):
            return kept
        if not self._begun:
            self._begun = True
            self.come_back()
            self._offload.make_way(self)
            self._offload.back.finish(self._back)
            self._offload.take_back(self._there)
            self._there = []
            if self._before is not None:
                self._before.come_back()
        return self._here[kept.region].as_strided(kept.shape, kept.stride)

    def leave(self) -> None:
        """Begin to copy all to the host."""
        self._there = [self._offload.room_for(x) for x in self._here]
        self._gone = self._offload.out.start(self._there, self._here)

    def left(self) -> None:
        """Give the device's memory back, as soon as the copies are done."""
        self._offload.out.finish(self._gone)
        self._here = []

    def come_back(self) -> None:
        """Begin to copy all to the device, if it is not there."""
        if not self._here:
            self._here = [torch.empty_like(x, device=self._offload.device) for x in self._there]
            self._back = self._offload.back.start(self._here, self._there)
