"""z-loss, QK-norm and the shrunk embedding gradient, each against what it is meant to be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hpcpar.config.job import Model
from hpcpar.nn.attention import Attention
from hpcpar.nn.transformer import Transformer, cross_entropy


def small(**more: object) -> Model:
    return Model(layers=1, hidden=16, heads=4, kv_heads=2, ffn=32, seq=8, vocab=19, **more)  # type: ignore[arg-type]


def test_the_z_loss_is_in_the_gradient_and_not_in_the_value() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True), torch.randint(7, (2, 5))
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = cross_entropy(logits, targets, 0.3)
    assert loss.item() == plain.item()
    (got,) = torch.autograd.grad(loss, logits)
    (want,) = torch.autograd.grad(plain + 0.3 * logits.logsumexp(-1).square().mean(), logits)
    assert torch.allclose(got, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_qk_norm_makes_attention_blind_to_the_scale_of_queries_and_keys(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    outs = {}
    for normed in (False, True):
        attention = Attention(small(kind=kind, qk_norm=normed)).double()
        torch.manual_seed(1)
        with torch.no_grad():
            for p in attention.parameters():
                p.copy_(torch.randn(p.shape))
            first = attention.attend(x, None)
            for matrix in (attention.q, attention.k):
                for p in matrix.parameters():
                    p.mul_(10)
            outs[normed] = (first, attention.attend(x, None))
    assert torch.allclose(*outs[True], rtol=0, atol=1e-4) and not torch.allclose(*outs[False], rtol=0, atol=1e-1)


def test_the_embeddings_gradient_shrinks_and_its_value_stays() -> None:
    tokens = torch.randint(19, (2, 8), generator=torch.Generator().manual_seed(0))
    found = {}
    for factor in (1.0, 0.1):
        torch.manual_seed(2)
        network = Transformer(small(tied=False, embedding_grad=factor), range(1), first=True, last=True).double()
        loss = network(tokens, tokens)
        loss.backward()
        found[factor] = (loss.item(), network.embedding.token.weight.grad, network.head.weight.grad)
    assert found[1.0][0] == found[0.1][0]
    assert torch.allclose(found[1.0][1] * 0.1, found[0.1][1], rtol=0, atol=1e-16)
    assert torch.equal(found[1.0][2], found[0.1][2])
