"""The one executor: plays a stage's list of actions, whatever the schedule."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hpcpar.comm.p2p import Incoming, Neighbours
from hpcpar.layout.schedule import RECEIVES, Action, Kind
from hpcpar.nn.dropout import Draw
from hpcpar.nn.transformer import Transformer
from hpcpar.parallel.gradients import PutOff


@dataclass(frozen=True)
class Microbatch:
    """What one forward reads: tokens and targets [batch, seq] int64, and what dropout depends on."""

    tokens: Tensor
    targets: Tensor
    draw: Draw | None = None


@dataclass
class Played:
    """What a step left behind: each microbatch's mean loss (float64, last chunk), and what happened when.

    A receive's event is the wait for its message, where it was waited for.
    """

    losses: list[Tensor] = field(default_factory=list)
    events: list[tuple[str, float, float]] = field(default_factory=list)  # action, start and end in seconds


class Pipeline:
    """Plays actions on a stage's chunks. With one stage and chunk it is plain gradient accumulation."""

    def __init__(self, chunks: Mapping[int, Transformer], neighbours: Neighbours, token_shape: tuple[int, int],
                 note: Callable[[str], None] = lambda action: None, put_off: PutOff | None = None):
        self.chunks, self.neighbours, self.note = chunks, neighbours, note
        self.token_shape = token_shape  # (seq(/tp), hidden): what a message holds a sequence
        self.put_off = [] if put_off is None else put_off  # where backward leaves what W does

    def play(self, program: Sequence[Action], microbatch: Callable[[int], Microbatch], batch: int,
             loss_factor: float) -> Played:
        """Play a program; gradients are of sum over microbatches of loss x loss_factor.

        `microbatch(m)` gives this replica's microbatch m of `batch` sequences. A program without backwards keeps no
        activations.
        """
        step = _Step(self, microbatch, (batch, *self.token_shape), loss_factor)
        with torch.set_grad_enabled(any(action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) for action in program)):
            for action in program:
                _PLAY.get(action.kind, _Step.transfer)(step, action)
            self.neighbours.wait_sends()
        return step.played


class _Step:
    """The tensors of one step in flight, by chunk and microbatch."""

    def __init__(self, pipeline: Pipeline, microbatch: Callable[[int], Microbatch], shape: tuple[int, ...],
                 loss_factor: float):
        self.pipeline, self.microbatch, self.shape, self.loss_factor = pipeline, microbatch, shape, loss_factor
        self.played = Played()
        self.posted: dict[Action, Incoming] = {}
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.output_grads: dict[tuple[int, int], Tensor] = {}  # from a chunk on this rank
        self.input_grads: dict[tuple[int, int], Tensor] = {}  # for another rank
        self.put_off: dict[tuple[int, int], PutOff] = {}

    def transfer(self, action: Action) -> None:
        """Post a receive or a send."""
        at = action.chunk, action.microbatch
        if action.kind in RECEIVES:
            self.posted[action] = self.pipeline.neighbours.post_receive(action, self.shape)
            return
        with self.timed(action):
            if action.kind is Kind.SEND_BACKWARD:
                message = self.input_grads.pop(at)
            else:
                message = self.outputs[at] if torch.is_grad_enabled() else self.outputs.pop(at)
            self.pipeline.neighbours.send(action, message)

    def forward(self, action: Action) -> None:
        """Compute a chunk's activations, or the loss."""
        _, m, chunk = action
        network = self.pipeline.chunks[chunk]
        received = self.received(Action(Kind.RECEIVE_FORWARD, m, chunk))
        if received is not None:
            self.inputs[chunk, m] = received.requires_grad_(torch.is_grad_enabled())
        with self.timed(action):
            batch = self.microbatch(m)
            x = batch.tokens if network.first else self.inputs[chunk, m]
            out = network(x, batch.targets if network.last else None, batch.draw, self.loss_factor)
            if network.last:
                self.played.losses.append(out.detach().double() / self.loss_factor)
            if chunk + 1 in self.pipeline.chunks:  # the next chunk is here: no message, but a graph of its own
                self.inputs[chunk + 1, m] = out.detach().requires_grad_(torch.is_grad_enabled())
            if not torch.is_grad_enabled():
                self.inputs.pop((chunk, m), None)
            self.outputs[chunk, m] = out

    def backward(self, action: Action) -> None:
        """Compute a chunk's gradients: all (B), or the input's and what is not put off (I)."""
        kind, m, chunk = action
        grad = self.received(Action(Kind.RECEIVE_BACKWARD, m, chunk))
        with self.timed(action):
            out = self.outputs.pop((chunk, m))
            if self.pipeline.chunks[chunk].last:
                out.backward()
            else:
                _Seed.apply(out, self.output_grads.pop((chunk, m)) if grad is None else grad).backward()
            if chunk > 0:
                grads = self.output_grads if chunk - 1 in self.pipeline.chunks else self.input_grads
                before = chunk - 1 if chunk - 1 in self.pipeline.chunks else chunk
                grads[before, m] = _grad(self.inputs.pop((chunk, m)))
            self.put_off[chunk, m] = self.pipeline.put_off[:]
            self.pipeline.put_off.clear()
            if kind is Kind.BACKWARD:
                self.add_weight_gradients(chunk, m)

    def backward_weight(self, action: Action) -> None:
        """Compute the weight gradients that a backward has put off."""
        with self.timed(action):
            self.add_weight_gradients(action.chunk, action.microbatch)

    @torch.no_grad()
    def add_weight_gradients(self, chunk: int, m: int) -> None:
        """Do the matrix products that a backward has put off."""
        for product in self.put_off.pop((chunk, m)):
            product()

    def received(self, receive: Action) -> Tensor | None:
        """Wait for a message if one is to come; return it."""
        incoming = self.posted.pop(receive, None)
        if incoming is None:
            return None
        with self.timed(receive):
            return incoming.wait()

    @contextmanager
    def timed(self, action: Action) -> Iterator[None]:
        """Tell that an action begins, and keep when it began and ended."""
        self.pipeline.note(str(action))
        start = time.perf_counter()
        yield
        self.played.events.append((str(action), start, time.perf_counter()))


class _Seed(torch.autograd.Function):
    """A scalar from which a backward begins with a given gradient.

    torch's `out.backward(grad)` imports sympy to compare the two shapes: with 8 ranks on 2 cores a second at the start.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _one: Tensor) -> tuple[Tensor, None]:
        return ctx.grad, None


_PLAY = {Kind.FORWARD: _Step.forward, Kind.BACKWARD: _Step.backward, Kind.BACKWARD_INPUT: _Step.backward,
         Kind.BACKWARD_WEIGHT: _Step.backward_weight}


def _grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad
