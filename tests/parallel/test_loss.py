"""The loss in chunks against the plain one: value, gradients, and the bytes that it holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpcpar.layout.loss import CHUNK_BYTES, LEAST_TOKENS, LEAST_TOKENS_16_BIT, loss_chunks
from hpcpar.nn.linear import Vocabulary
from hpcpar.nn.transformer import head_loss
from hpcpar.parallel.gradients import PutOff, Sink
from hpcpar.parallel.loss import HeadLoss
from hpcpar.planner.memory import logits_bytes
from hpcpar.train.rehearse import Ledger
from tests.planner.jobs import job_of

HIDDEN, VOCAB, PADDED = 6, 13, 16


@pytest.fixture
def three_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 3 tokens a chunk."""
    monkeypatch.setattr("hpcpar.layout.loss.LEAST_TOKENS", 3)
    monkeypatch.setattr("hpcpar.layout.loss.CHUNK_BYTES", 1)


def head_of(weight: Tensor, put_off: PutOff | None = None) -> tuple[Vocabulary, list[int]]:
    """A vocabulary whose gradient goes to a sink full of last step's garbage, and the list of contributions."""
    scores, done = Vocabulary(*weight.shape, _weight=weight), []
    scores.product = Sink(torch.full_like(weight, torch.nan), lambda: done.append(1), put_off)
    return scores, done


def plain(x: Tensor, weight: Tensor, targets: Tensor, factor: float, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the gradients of x and weight, as autograd finds them."""
    x, weight = x.clone().requires_grad_(), weight[:VOCAB].clone().requires_grad_()
    scores = Vocabulary(*weight.shape, _weight=weight)
    loss = head_loss(x, scores, targets, factor, z_loss)
    loss.backward()
    return loss.detach(), x.grad, scores.weight.grad


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=draw, dtype=torch.float64)
                 for shape in ((2, 5, HIDDEN), (PADDED, HIDDEN)))
    return x.to(dtype), weight.to(dtype), torch.randint(VOCAB, (2, 5), generator=draw)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("put_off", [None, []])
@pytest.mark.usefixtures("three_tokens")
def test_value_and_gradients_are_those_of_the_plain_loss(z_loss: float, put_off: PutOff | None) -> None:
    x, weight, targets = case()
    scores, done = head_of(weight, put_off)
    own = x.clone().requires_grad_()
    loss = HeadLoss(VOCAB, z_loss)(own, scores, targets, 0.25)
    assert done == [1] and not put_off  # one contribution, there before backward
    loss.backward()
    want = plain(x, weight, targets, 0.25, z_loss)
    for got, expected in zip((loss.detach(), own.grad, scores.product.main[:VOCAB]), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
    assert not scores.product.main[VOCAB:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("three_tokens")
def test_narrow_logits_are_widened(dtype: torch.dtype) -> None:
    x, weight, targets = case(dtype)
    scores, _ = head_of(weight)
    scores.product.main = torch.zeros(weight.shape)
    own = x.clone().requires_grad_()
    loss = HeadLoss(VOCAB, 0.0)(own, scores, targets, 8.0)
    loss.backward()
    want = plain(x.double(), weight.double(), targets, 8.0, 0.0)
    assert loss.dtype == torch.float32 and own.grad.dtype == dtype
    for got, expected in zip((loss.detach(), own.grad, scores.product.main[:VOCAB]), want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=0.05, atol=0.05)


def test_without_gradients_only_the_value_is_computed() -> None:
    x, weight, targets = case()
    scores, done = head_of(weight)
    with torch.no_grad():
        loss = HeadLoss(VOCAB, 0.0)(x.requires_grad_(), scores, targets, 1.0)
    assert not done and scores.product.main.isnan().all()
    torch.testing.assert_close(loss, plain(x.detach(), weight, targets, 1.0, 0.0)[0])


@pytest.mark.parametrize(("precision", "dtype", "batch"), [("fp32", torch.float32, 1), ("bf16", torch.bfloat16, 4)])
def test_the_bytes_held_are_the_planners(precision: str, dtype: torch.dtype, batch: int) -> None:
    job = job_of(1, 8, 1, 1, 1, 1, 1, model={"vocab": 16384, "seq": 1024}, train={"precision": precision})
    x, weight = torch.zeros(batch * 1024, 8, dtype=dtype), torch.zeros(16384, 8, dtype=dtype)
    scores, _ = head_of(weight)
    scores.product.main = torch.zeros(16384, 8)
    targets, ledger = torch.zeros(batch * 1024, dtype=torch.int64), Ledger()
    x.requires_grad_()
    with ledger:
        HeadLoss(16384, 0.0)(x, scores, targets, 1.0)
    foretold = logits_bytes(job.model, 1, batch, precision=precision)
    chunk, logits_bytes_a_token = {"fp32": (256, 4 * 16384), "bf16": (2048, 8 * 16384)}[precision]
    assert foretold == chunk * logits_bytes_a_token
    small = 3 * weight.nbytes + batch * 64 * 1024 * 8  # x, weights and their gradient; a few numbers a token
    assert foretold <= ledger.peak <= foretold + small < batch * 1024 * logits_bytes_a_token


@pytest.mark.parametrize(("element_bytes", "least"), [(4, LEAST_TOKENS), (2, LEAST_TOKENS_16_BIT)])
@pytest.mark.parametrize(("tokens", "rows"), [
    (1, 8), (256, 8192), (2048, 8192), (2049, 53248), (4096, 1024), (7, 10**7)])
def test_chunks_cover_the_tokens_and_are_as_large_as_allowed(tokens: int, rows: int, element_bytes: int,
                                                             least: int) -> None:
    sizes = loss_chunks(tokens, rows, element_bytes)
    most = max(least, CHUNK_BYTES // (4 * rows))
    assert sum(sizes) == tokens and max(sizes) - min(sizes) <= 1
    assert max(sizes) <= most and len(sizes) == -(-tokens // most)
