from __future__ import annotations

import pytest
import torch

from hpcpar.config.job import Optim
from hpcpar.optim.adamw import AdamW, Run

OPTIM = Optim(betas=(0.8, 0.95), eps=1e-7, weight_decay=0.3)
SIZES = [(5, True), (64, False), (1, True), (33, False)]


def runs_of(flat: dict[str, torch.Tensor], sizes: list[tuple[int, bool]]) -> list[Run]:
    runs, start = [], 0
    for size, decayed in sizes:
        at = slice(start, start + size)
        runs.append(Run(*(flat[k][at] for k in ("weight", "grad", "exp_avg", "exp_avg_sq")), decayed))
        start += size
    return runs


def flat_state(numel: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"weight": torch.randn(numel, dtype=dtype), "grad": torch.zeros(numel, dtype=dtype),
            "exp_avg": torch.zeros(numel, dtype=dtype), "exp_avg_sq": torch.zeros(numel, dtype=dtype)}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("sizes", [SIZES, [(7, True)], [(7, False)]])
def test_flat_runs_follow_torchs_plain_adamw(
    dtype: torch.dtype, tolerance: float, sizes: list[tuple[int, bool]]
) -> None:
    flat = flat_state(sum(size for size, _ in sizes), dtype)
    apart = [torch.nn.Parameter(run.weight.clone()) for run in runs_of(flat, sizes)]
    theirs = torch.optim.AdamW(
        [{"params": [p], "weight_decay": OPTIM.weight_decay if decayed else 0.0}
         for p, (_, decayed) in zip(apart, sizes, strict=True)],
        lr=1.0, betas=OPTIM.betas, eps=OPTIM.eps, foreach=False, fused=False)
    ours = AdamW(runs_of(flat, sizes), OPTIM)
    start = flat["weight"].clone()
    for step in range(6):
        grad, lr = torch.randn(flat["grad"].shape, dtype=dtype), 0.01 * (step + 1)
        flat["grad"].copy_(grad)
        for p, run in zip(apart, runs_of({**flat, "grad": grad}, sizes), strict=True):
            p.grad = run.grad.clone()
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
        ours.update(lr, step)
        for p, run in zip(apart, runs_of(flat, sizes), strict=True):
            torch.testing.assert_close(run.weight, p.detach(), rtol=tolerance, atol=tolerance)
            for name in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(getattr(run, name), theirs.state[p][name], rtol=tolerance, atol=tolerance)
    assert ((flat["weight"] - start).abs() > 1e-6).all()


def test_only_decayed_runs_shrink_without_a_gradient() -> None:
    flat = flat_state(4, torch.float64)
    start = flat["weight"].clone()
    AdamW(runs_of(flat, [(2, True), (2, False)]), OPTIM).update(0.5, 0)
    torch.testing.assert_close(flat["weight"][:2], start[:2] * (1 - 0.5 * 0.3))
    assert torch.equal(flat["weight"][2:], start[2:])


def test_an_optimizer_made_anew_over_the_same_tensors_goes_on() -> None:
    whole, broken = flat_state(8, torch.float64), flat_state(8, torch.float64)
    grads = torch.randn(6, 8, dtype=torch.float64)
    one = AdamW(runs_of(whole, [(8, True)]), OPTIM)
    for step, grad in enumerate(grads):
        for flat in (whole, broken):
            flat["grad"].copy_(grad)
        one.update(0.1, step)
        AdamW(runs_of(broken, [(8, True)]), OPTIM).update(0.1, step)
    for name in whole:
        assert torch.equal(whole[name], broken[name])


def test_a_rank_without_elements_updates_nothing() -> None:
    AdamW([], OPTIM).update(0.1, 0)
