"""The one table against the network itself, and against the published counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpcpar.config.job import Model
from hpcpar.config.load import job_from_tables
from hpcpar.config.resolve import resolve
from hpcpar.layout.parameters import parameter_table
from hpcpar.nn.transformer import Transformer

YUAN = {"layers": 76, "hidden": 16384, "heads": 128, "seq": 2048, "vocab": 53228}


def model(**values: Any) -> Model:
    return resolve(job_from_tables({"model": {"layers": 3, "hidden": 48, "heads": 6, "seq": 8, "vocab": 50, **values}}
                                   )).model


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("ffn", [None, 40])
def test_the_table_is_the_network(kind: str, tied: bool, kv_heads: int, ffn: int | None) -> None:
    wish = model(kind=kind, tied=tied, kv_heads=kv_heads, **({"ffn": ffn} if ffn else {}))
    with torch.device("meta"):
        network = Transformer(wish, range(wish.layers), first=True, last=True)
    built = {name: tuple(p.shape) for name, p in network.named_parameters()}
    table = parameter_table(wish)
    assert {p.name: p.shape for p in table} == built
    assert len(table) == len(built)
    assert sum(p.numel for p in table) == sum(p.numel() for p in network.parameters())
    assert not list(network.buffers())


@pytest.mark.parametrize("shape", [
    {"layers": 12, "hidden": 768, "heads": 12, "seq": 1024, "vocab": 50257}, YUAN,
    {"layers": 2, "hidden": 12, "heads": 3, "seq": 5, "vocab": 7},
])
def test_gpt_counts_follow_the_formula(shape: dict[str, int]) -> None:
    # 12 l h^2 (1 + 13/(12h) + (V+s)/(12lh)), Narayanan et al. 2021, section 3.4; the final norm's 2h are left out there
    layers, h = shape["layers"], shape["hidden"]
    formula = 12 * layers * h * h + 13 * layers * h + (shape["vocab"] + shape["seq"]) * h
    assert sum(p.numel for p in parameter_table(model(**shape))) == formula + 2 * h


def test_published_counts() -> None:
    assert sum(p.numel for p in parameter_table(model(layers=12, hidden=768, heads=12, seq=1024, vocab=50257))
               ) == 124_439_808  # GPT-2 small
    assert round(sum(p.numel for p in parameter_table(model(**YUAN))) / 1e9, 2) == 245.73
    llama = model(kind="llama", layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256, tied=False)
    assert sum(p.numel for p in parameter_table(llama)) == 8_030_261_248  # Llama 3 8B


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("tp_size", [1, 2, 3, 6])
def test_tp_boxes_cover_every_tensor_as_often_as_it_is_shared(kind: str, tp_size: int) -> None:
    for p in parameter_table(model(kind=kind, kv_heads=1, ffn=48, tied=False)):
        held = torch.zeros(p.shape, dtype=torch.int64)
        for tp_rank in range(tp_size):
            box = p.box(tp_size, tp_rank)
            held[box.slices()] += 1
            local = p.local_shape(tp_size, tp_rank)
            assert all(n >= b for n, b in zip(local, box.size, strict=True))
            assert local == p.local_shape(tp_size, 0)
        copies = tp_size if p.tp_dim is None else p.shared_by(tp_size)
        assert (held == copies).all(), p.name


def test_only_the_vocabulary_is_padded() -> None:
    for p in parameter_table(model(vocab=53, tied=False)):
        padded = p.local_shape(2, 1) != p.box(2, 1).size
        assert padded == p.is_vocabulary
    assert parameter_table(model(vocab=53))[0].local_shape(2, 0) == (32, 48)
    assert parameter_table(model(vocab=64))[0].local_shape(2, 0) == (32, 48)
    assert parameter_table(model(vocab=53))[0].local_shape(1, 0) == (56, 48)


def test_replicated_parameters_have_partial_gradients_and_cut_ones_have_not() -> None:
    # what works on a rank's own tokens under sequence parallelism: norms, biases after the sum over tp, positions
    table = {p.name: p for kind in ("gpt", "llama") for p in parameter_table(model(kind=kind, tied=False))}
    assert "layers.0.attention.out.bias" in table
    for p in table.values():
        assert p.partial == (p.tp_dim is None), p.name


def test_matrices_decay_and_vectors_do_not() -> None:
    for p in parameter_table(model()):
        assert p.decayed == (not p.name.endswith("bias") and "norm" not in p.name)
