"""Activations forward and gradients backward between the stages of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hpcpar.comm.groups import Group, Groups
from hpcpar.layout.schedule import Action, Kind, receive_of


@dataclass(frozen=True)
class Incoming:
    """A receive that was posted."""

    work: dist.Work
    buffer: Tensor

    def wait(self) -> Tensor:
        """Return the message once it is here."""
        self.work.wait()
        return self.buffer


class Neighbours:
    """A stage's channels to the stages that hold the chunks before and after its own; shapes [batch, seq(/tp), hidden].

    A send and a receive are posted and not waited for; a message's tensor is kept until it is through.
    """

    def __init__(self, groups: Groups, chunk_ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self._groups, self._chunk_ranks, self._dtype, self._device = groups, chunk_ranks, dtype, device
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def send(self, action: Action, x: Tensor) -> None:
        """Post a chunk's activations to the chunk after it, or its input's gradient to the one before."""
        self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]
        x = x.detach().contiguous()
        peer = self._chunk_ranks[receive_of(action).chunk]
        work = dist.isend(x, group=self._group(action.kind is Kind.SEND_FORWARD), group_dst=peer)
        assert work is not None
        self._sent.append((work, x))

    def post_receive(self, action: Action, shape: tuple[int, ...]) -> Incoming:
        """Post the receive of a chunk's input, or of its output's gradient."""
        forward = action.kind is Kind.RECEIVE_FORWARD
        peer = self._chunk_ranks[action.chunk + (-1 if forward else 1)]
        buffer = torch.empty(shape, dtype=self._dtype, device=self._device)
        work = dist.irecv(buffer, group=self._group(forward), group_src=peer)
        assert work is not None
        return Incoming(work, buffer)

    def wait_sends(self) -> None:
        """Wait until every posted send is through."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _group(self, forward: bool) -> Group | None:
        return self._groups.pp_forward if forward else self._groups.pp_backward
