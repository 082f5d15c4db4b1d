"""The one executor: plays a stage's list of actions, whatever the schedule."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpcpar.comm.p2p import Neighbours
from hpcpar.layout.schedule import Action, Kind
from hpcpar.nn.dropout import Draw
from hpcpar.nn.transformer import Transformer


@dataclass(frozen=True)
class Microbatch:
    """What one forward reads: tokens and targets [batch, seq] int64, and what dropout depends on."""

    tokens: Tensor
    targets: Tensor
    draw: Draw | None = None


@dataclass
class Played:
    """What a step left behind: each microbatch's mean loss (float64, last stage), and what happened when."""

    losses: list[Tensor] = field(default_factory=list)
    events: list[tuple[str, float, float]] = field(default_factory=list)  # action, start and end in seconds


class Pipeline:
    """Plays actions on a stage. With one stage it is plain gradient accumulation."""

    def __init__(self, stage: Transformer, neighbours: Neighbours, token_shape: tuple[int, int],
                 note: Callable[[str], None] = lambda action: None):
        self.stage, self.neighbours, self.note = stage, neighbours, note
        self.token_shape = token_shape  # (seq(/tp), hidden): what a message holds a sequence

    def play(self, program: Sequence[Action], microbatch: Callable[[int], Microbatch], batch: int, loss_factor: float,
             before_last_backward: Callable[[], None] = lambda: None) -> Played:
        """Play a program; gradients are of sum over microbatches of loss x loss_factor.

        `microbatch(m)` gives this replica's microbatch m of `batch` sequences. A program without backwards keeps no
        activations. The last backward is announced, so that finished gradients can be reduced while it runs.
        """
        played = Played()
        last_backward = max((i for i, a in enumerate(program) if a.kind is Kind.BACKWARD), default=-1)
        step = _Step(self, microbatch, (batch, *self.token_shape), loss_factor, played)
        with torch.set_grad_enabled(last_backward >= 0):
            for index, action in enumerate(program):
                self.note(str(action))
                start = time.perf_counter()
                if index == last_backward:
                    before_last_backward()
                step.play(action)
                played.events.append((str(action), start, time.perf_counter()))
            self.neighbours.wait_sends()
        return played


class _Step:
    """The tensors of one step in flight, by microbatch."""

    def __init__(self, pipeline: Pipeline, microbatch: Callable[[int], Microbatch], shape: tuple[int, ...],
                 loss_factor: float, played: Played):
        self.stage, self.neighbours, self.shape = pipeline.stage, pipeline.neighbours, shape
        self.microbatch, self.loss_factor, self.played = microbatch, loss_factor, played
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.grads: dict[int, Tensor] = {}

    def play(self, action: Action) -> None:
        kind, m = action
        if kind is Kind.RECEIVE_FORWARD:
            x = self.neighbours.receive_forward(self.shape)
            self.inputs[m] = x.requires_grad_(torch.is_grad_enabled())
        elif kind is Kind.FORWARD:
            self.forward(m)
        elif kind is Kind.SEND_FORWARD:
            self.neighbours.send_forward(self.outputs[m])
            if not torch.is_grad_enabled():
                del self.outputs[m]
        elif kind is Kind.RECEIVE_BACKWARD:
            self.grads[m] = self.neighbours.receive_backward(self.shape)
        elif kind is Kind.BACKWARD:
            self.backward(m)
        else:
            grad = self.inputs.pop(m).grad
            assert grad is not None
            self.neighbours.send_backward(grad)

    def forward(self, m: int) -> None:
        batch = self.microbatch(m)
        x = batch.tokens if self.stage.first else self.inputs[m]
        out = self.stage(x, batch.targets if self.stage.last else None, batch.draw)
        if self.stage.last:
            self.played.losses.append(out.detach().double())
        if not torch.is_grad_enabled():
            self.inputs.pop(m, None)
        self.outputs[m] = out

    def backward(self, m: int) -> None:
        out = self.outputs.pop(m)
        if self.stage.last:
            (out * self.loss_factor).backward()
        else:
            out.backward(self.grads.pop(m))
