from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hpcpar.config.load import job_from_tables
from hpcpar.config.resolve import resolve
from hpcpar.nn.transformer import Transformer
from hpcpar.parallel.split import WeightGradients, add_weight_gradients, apply_split_backward


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6)])
def test_the_two_halves_together_are_the_gradient_of_linear(biased: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True) if biased else None
    leaves = [t for t in (x, weight, bias) if t is not None]
    out = F.linear(x, weight, bias)
    factor = torch.randn_like(out)
    wanted = torch.autograd.grad(out, leaves, factor)
    halves = WeightGradients()
    split = halves.linear(x, weight, bias)
    assert torch.equal(split, out)
    split.backward(factor)
    assert weight.grad is None and torch.equal(x.grad, wanted[0])
    taken = halves.take()
    assert len(taken) == 1 and halves.take() == []
    add_weight_gradients(taken)
    for leaf, want in zip(leaves, wanted, strict=True):
        assert torch.equal(leaf.grad, want)


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_every_matrix_of_a_network_is_put_off_and_nothing_else(kind: str) -> None:
    model = resolve(job_from_tables({"model": {"kind": kind, "layers": 2, "hidden": 16, "heads": 2, "seq": 4,
                                               "vocab": 11, "tied": False}})).model
    network = Transformer(model, range(2), first=True, last=True)
    halves = apply_split_backward(network)
    tokens = torch.arange(8).view(2, 4)
    network(tokens, tokens).backward()
    without = {name for name, p in network.named_parameters() if p.grad is None}
    assert without == {name for name, p in network.named_parameters() if p.dim() == 2 and "embedding" not in name}
    add_weight_gradients(halves.take())
    assert all(p.grad is not None for p in network.parameters())
