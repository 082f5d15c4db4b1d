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
        self._steps: list[Tensor] = []
        groups = [{"params": [], "weight_decay": optim.weight_decay}, {"params": [], "weight_decay": 0.0}]
        # lr 1.0 stands in until the first update gives it
        self._runs = list(runs)
        parameters = [torch.nn.Parameter(run.weight, requires_grad=True) for run in runs]
        for parameter, run in zip(parameters, runs, strict=True):
            parameter.grad = run.grad
            groups[0 if run.decayed else 1]["params"].append(parameter)  # type: ignore[attr-defined]
        groups = [group for group in groups if group["params"]]
        self._torch = None
        if groups:
            self._torch = torch.optim.AdamW(groups, lr=1.0, betas=optim.betas, eps=optim.eps, fused=True)
        for parameter, run in zip(parameters, runs, strict=True):
            assert self._torch is not None
            step = torch.zeros((), dtype=torch.float32, device=run.weight.device)
            self._steps.append(step)
            self._torch.state[parameter] = {"step": step, "exp_avg": run.exp_avg, "exp_avg_sq": run.exp_avg_sq}

    def update(self, lr: float, num_updates: int) -> None:
        """Apply one update in place; `num_updates` is how many were made before (for the bias correction)."""
        if self._torch is None:
            return
        for step in self._steps:
            step.fill_(num_updates)
        for group in self._torch.param_groups:
            group["lr"] = lr
        self._torch.step()
