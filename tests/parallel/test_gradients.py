"""Matrix products that backward leaves for W."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from hpcpar.comm.groups import open_groups
from hpcpar.layout.layout import Layout
from hpcpar.nn.linear import Linear
from hpcpar.parallel.build import build
from hpcpar.parallel.gradients import PutOff, Sink, project
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


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("with_room", [False, True])
def test_several_matrices_of_one_input(with_room: bool, split: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    matrices = [Linear(6, width, bias=width != 4, dtype=torch.float64) for width in (5, 4, 7)]
    outs = tuple(matrix(x) for matrix in matrices)
    factors = [torch.randn_like(out) for out in outs]
    parameters = [p for matrix in matrices for p in matrix.parameters()]
    wanted = dict(zip([x, *parameters], torch.autograd.grad(outs, [x, *parameters], factors), strict=True))
    put_off: PutOff = []
    rooms: list[tuple[int, ...]] = []

    def room(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor | None:
        rooms.append(tuple(shape))
        return like.new_full(shape, torch.nan) if with_room else None

    mains = [torch.full_like(matrix.weight, torch.nan).detach() for matrix in matrices]
    for matrix, main in zip(matrices, mains, strict=True):
        matrix.product = Sink(partial(main.view, main.shape), list, put_off if split else None)
        matrix.product.input_room = room
    torch.autograd.backward(project(x, *matrices), factors)
    with torch.no_grad():
        for half in put_off:
            half()
    torch.testing.assert_close(x.grad, wanted[x], rtol=1e-14, atol=1e-14)
    for matrix, main in zip(matrices, mains, strict=True):
        assert torch.equal(main, wanted[matrix.weight])
        assert matrix.bias is None or torch.equal(matrix.bias.grad, wanted[matrix.bias])
    assert rooms == [(2, 3, 6)] and len(put_off) == 3 * split


def test_an_output_lies_where_it_is_summed() -> None:
    matrix, rooms = Linear(6, 5, bias=False), []
    sink = Sink(lambda: torch.zeros(5, 6), list)
    sink.output_room = lambda shape, like: rooms.append(like.new_empty(shape)) or rooms[-1]
    x = torch.randn(2, 3, 6)
    out = sink(x, matrix.weight, None)
    assert out.data_ptr() == rooms[0].data_ptr() and torch.equal(out, matrix(x))
    sink(x, matrix.weight, torch.zeros(5))  # what has a bias is no partial sum
    assert len(rooms) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_was_built_goes_when_nobody_holds_it(precision: str) -> None:
    layout = Layout(job_of(1, 8, 1, 1, 1, 1, 1, model={"vocab": 64, "seq": 8}, train={"precision": precision}))
    _, optimizer = build(layout, open_groups(layout.mesh, 0), torch.device("cpu"))
    held = weakref.ref(optimizer.buckets[0])
    del _, optimizer
    gc.collect()
    assert held() is None
