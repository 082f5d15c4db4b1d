"""Matrix products that backward leaves for W."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from hpcpar.comm.groups import open_groups
from hpcpar.layout.layout import Layout
from hpcpar.parallel.build import build
from hpcpar.parallel.gradients import PutOff, Sink
from tests.planner.jobs import job_of


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6)])
def test_the_two_halves_together_are_the_gradient_of_linear(biased: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True) if biased else None
    out = F.linear(x, weight, bias)
    factor = torch.randn_like(out)
    wanted = torch.autograd.grad(out, [t for t in (x, weight, bias) if t is not None], factor)
    put_off: PutOff = []
    done: list[int] = []
    main = torch.full_like(weight, torch.nan).detach()
    sink = Sink(lambda: main, lambda: done.append(1), put_off)
    sink(x, weight, bias).backward(factor)
    assert torch.equal(x.grad, wanted[0]) and (bias is None or torch.equal(bias.grad, wanted[2]))
    assert len(put_off) == 1 and not done and main.isnan().all()
    with torch.no_grad():
        put_off[0]()
    assert done == [1] and torch.equal(main, wanted[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_was_built_goes_when_nobody_holds_it(precision: str) -> None:
    layout = Layout(job_of(1, 8, 1, 1, 1, 1, 1, model={"vocab": 64, "seq": 8}, train={"precision": precision}))
    _, optimizer = build(layout, open_groups(layout.mesh, 0), torch.device("cpu"))
    held = weakref.ref(optimizer.buckets[0])
    del _, optimizer
    gc.collect()
    assert held() is None
