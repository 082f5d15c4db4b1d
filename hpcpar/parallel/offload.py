"""Activations wait for their backward in the host's memory: layout.recompute = "offload".

    forward     compute layer i  |  copy layer i-1 out
    backward    compute layer i  |  copy layer i-1 back

A layer's copies begin when it is computed, and those of the layer after it only when they have ended: the device holds
two layers' activations at most, and a slow link makes the computation wait. What is computed last stays until another
layer is: a backward that follows at once copies nothing of it back. The first layer of any other backward stands still
for its own. Source: Rhu et al. 2016, vDNN, arXiv 1602.08124.
"""

from __future__ import annotations

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

    def room_for(self, x: Tensor) -> Tensor:
        """Return memory of the host that x [elements] can be copied to without the host's doing."""
        return torch.empty(len(x), dtype=x.dtype, pin_memory=self._stream is not None)

    def start(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> torch.cuda.Event | None:
        """Copy each source once what was launched before is done; both must live until `finish` of the result."""
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
        self.leaving: Kept | None = None  # whose copies out are under way

    def run_blocks_of(self, stage: Transformer) -> None:
        """Take the place of a stage's calls of its layers."""
        if blocks := stage.blocks():
            stage.run_block = partial(self._run, blocks[0])

    def _run(self, first: Block, block: Block, x: Tensor, rotary: Tensor | None, draw: Draw | None) -> Tensor:
        if not torch.is_grad_enabled():
            return block(x, rotary, draw)  # type: ignore[no-any-return]
        before = None if block is first else self.leaving
        kept = Kept(self, before, [*block.parameters()] + ([] if rotary is None else [rotary]))
        with saved_tensors_hooks(kept.pack, kept.unpack):
            out: Tensor = block(x, rotary, draw)
        self.settle()
        kept.leave()
        self.leaving = kept
        return out

    def settle(self, but: Kept | None = None) -> None:
        """Give the device's memory of the layer that leaves back, unless it is `but`, which stays there."""
        if self.leaving is not None and self.leaving is not but:
            self.leaving.left()
        self.leaving = None


class View(NamedTuple):
    """A tensor as a look at one of its layer's regions of memory."""

    region: int
    shape: torch.Size
    stride: tuple[int, ...]


class Kept:
    """What one layer keeps of one microbatch; autograd holds it as long as it needs some of that."""

    def __init__(self, offload: Offload, before: Kept | None, others: Iterable[Tensor]):
        self._offload, self._before = offload, before
        self._others = {each.untyped_storage()._cdata for each in others}  # that are there anyway
        self._numbers: dict[tuple[object, ...], int] = {}
        self._here: list[Tensor] = []  # regions of memory, on the device; empty while they are not
        self._there: list[Tensor] = []
        self._gone: torch.cuda.Event | None = None
        self._back: torch.cuda.Event | None = None
        self._begun = False  # its backward

    def pack(self, x: Tensor) -> Tensor | View:
        """Take a tensor that autograd would keep; return what it keeps instead."""
        memory = x.untyped_storage()._cdata
        if x.device != self._offload.device or memory in self._others or not x.numel():
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
            self._offload.settle(but=self)
            self.come_back()
            self._offload.back.finish(self._back)
            if self._before is not None:
                self._before.come_back()
        return self._here[kept.region].as_strided(kept.shape, kept.stride)

    def leave(self) -> None:
        """Begin to copy all to the host: the layer is computed."""
        self._numbers.clear()
        self._there = [self._offload.out.room_for(x) for x in self._here]
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
