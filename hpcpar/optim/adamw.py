"""AdamW on flat local shards; the update itself is torch's fused one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcpar.config.job import Optim


@dataclass(frozen=True)
class Run:
    """A flat run of elements that are updated alike; all tensors are 1-D views of equal length."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    decayed: bool


class AdamW:
    """Decoupled weight decay with Adam (Loshchilov and Hutter 2017, arXiv 1711.05101) on runs of local elements.

    The tensors stay the caller's: moments are updated where the caller keeps them, so that a checkpoint finds them.
    """

    def __init__(self, runs: Sequence[Run], optim: Optim):
        self._optim = optim
        decay = {True: optim.weight_decay, False: 0.0}
        self._groups = [(decay[decayed], [run for run in runs if run.decayed == decayed]) for decayed in (True, False)]

    def update(self, lr: float, num_updates: int) -> None:
        """Apply one update in place; `num_updates` is how many were made before (for the bias correction)."""
        optim = self._optim
        for weight_decay, runs in self._groups:
            if not runs:
                continue
            count = torch.full((), num_updates + 1.0, device=runs[0].weight.device)
            # The kernel of torch.optim.AdamW(fused=True), without that class: its first use imports torch._dynamo,
            # which takes as long as all else that a rank does before its first step
            torch._fused_adamw_([run.weight for run in runs], [run.grad for run in runs],
                                [run.exp_avg for run in runs], [run.exp_avg_sq for run in runs], [],
                                [count] * len(runs), lr=lr, beta1=optim.betas[0], beta2=optim.betas[1],
                                weight_decay=weight_decay, eps=optim.eps, amsgrad=False, maximize=False)
