"""Activations forward and gradients backward between neighbouring pipeline stages."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hpcpar.comm.groups import Groups


class Neighbours:
    """A stage's channels to the stages before and after it; shapes [batch, seq(/tp), hidden].

    A send is posted and not waited for; its tensor is kept until it is through. A receive waits.
    """

    def __init__(self, groups: Groups, dtype: torch.dtype, device: torch.device):
        self._groups, self._dtype, self._device = groups, dtype, device
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def send_forward(self, x: Tensor) -> None:
        """Post activations to the next stage."""
        self._send(x, self._groups.pp_forward, self._groups.at.pp_rank + 1)

    def send_backward(self, grad: Tensor) -> None:
        """Post the gradient of this stage's input to the stage before."""
        self._send(grad, self._groups.pp_backward, self._groups.at.pp_rank - 1)

    def receive_forward(self, shape: tuple[int, ...]) -> Tensor:
        """Wait for activations from the stage before."""
        return self._receive(shape, self._groups.pp_forward, self._groups.at.pp_rank - 1)

    def receive_backward(self, shape: tuple[int, ...]) -> Tensor:
        """Wait for the gradient of this stage's output from the next stage."""
        return self._receive(shape, self._groups.pp_backward, self._groups.at.pp_rank + 1)

    def wait_sends(self) -> None:
        """Wait until every posted send is through."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _send(self, x: Tensor, group: dist.ProcessGroup | None, peer: int) -> None:
        self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]
        x = x.detach().contiguous()
        work = dist.isend(x, group=group, group_dst=peer)
        assert work is not None
        self._sent.append((work, x))

    def _receive(self, shape: tuple[int, ...], group: dist.ProcessGroup | None, peer: int) -> Tensor:
        x = torch.empty(shape, dtype=self._dtype, device=self._device)
        dist.recv(x, group=group, group_src=peer)
        return x
