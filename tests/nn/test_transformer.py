"""The network against transformers' GPT-2 and Llama: logits, loss and all gradients in float64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hpcpar.config.job import Model
from hpcpar.config.load import job_from_tables
from hpcpar.config.resolve import resolve
from hpcpar.layout.parameters import parameter_table
from hpcpar.nn.dropout import draw_for
from hpcpar.nn.init import initial_values
from hpcpar.nn.transformer import Transformer, cross_entropy

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def model(**values: Any) -> Model:
    small = {"layers": 3, "hidden": 24, "heads": 6, "ffn": 40, "seq": 11, "vocab": 37, "init_std": 0.3}
    return resolve(job_from_tables({"model": {**small, **values}})).model


def network(wish: Model) -> Transformer:
    made = Transformer(wish, range(wish.layers), first=True, last=True).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in parameter_table(wish):
            values = initial_values(p, p.box(1, 0), seed=1)
            # norms and biases too: at their first values a swapped pair would not show
            made.get_parameter(p.name).copy_(values + 0.1 * torch.randn(p.shape, dtype=torch.float64))
    return made


def tokens(wish: Model, batch: int = 3) -> tuple[Tensor, Tensor]:
    rows = torch.randint(wish.vocab, (batch, wish.seq + 1), generator=torch.Generator().manual_seed(3))
    return rows[:, :-1], rows[:, 1:]


def gpt2(wish: Model, attention: str) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=wish.vocab, n_positions=wish.seq, n_embd=wish.hidden, n_layer=wish.layers, n_head=wish.heads,
        n_inner=wish.ffn, activation_function="gelu_new", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        layer_norm_epsilon=1e-5, tie_word_embeddings=wish.tied, attn_implementation=attention, use_cache=False,
        bos_token_id=0, eos_token_id=0)).double()


class WideRotary(nn.Module):
    """Llama's rotary table in float64: transformers makes it in float32 whatever the model's dtype."""

    def __init__(self, wish: Model):
        super().__init__()
        head_dim = wish.hidden // wish.heads
        self.frequencies = [wish.rope_theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]

    def forward(self, x: Tensor, position_ids: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * torch.tensor(self.frequencies, dtype=torch.float64)
        both = torch.cat((angles, angles), dim=-1)
        return both.cos(), both.sin()


def wide_norm(norm: Any, x: Tensor) -> Tensor:
    """Llama's norm in float64: transformers narrows its input to float32."""
    return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))


def llama(wish: Model, attention: str) -> LlamaForCausalLM:
    made = LlamaForCausalLM(LlamaConfig(
        vocab_size=wish.vocab, hidden_size=wish.hidden, intermediate_size=wish.ffn, num_hidden_layers=wish.layers,
        num_attention_heads=wish.heads, num_key_value_heads=wish.kv_heads, max_position_embeddings=wish.seq,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": wish.rope_theta}, hidden_act="silu",
        tie_word_embeddings=wish.tied, attn_implementation=attention, use_cache=False, bos_token_id=0,
        eos_token_id=0, pad_token_id=None)).double()
    made.model.rotary_emb = WideRotary(wish)
    for module in made.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = partial(wide_norm, module)
    return made


def gpt2_pairs(theirs: nn.Module, ours: dict[str, Tensor], layers: int) -> Iterator[tuple[str, Tensor]]:
    """Our tensors under GPT-2's names, which holds [in, out] matrices and q, k, v in one."""
    yield "transformer.wte.weight", ours["embedding.token.weight"]
    yield "transformer.wpe.weight", ours["embedding.position.weight"]
    for kind in ("weight", "bias"):
        yield f"transformer.ln_f.{kind}", ours[f"final_norm.{kind}"]
        for i in range(layers):
            def turned(name: str, number: int = i, kind: str = kind) -> Tensor:
                tensor = ours[f"layers.{number}.{name}.{kind}"]
                return tensor.T if kind == "weight" else tensor

            head = f"transformer.h.{i}"
            yield f"{head}.ln_1.{kind}", ours[f"layers.{i}.attention_norm.{kind}"]
            yield f"{head}.ln_2.{kind}", ours[f"layers.{i}.mlp_norm.{kind}"]
            yield f"{head}.attn.c_attn.{kind}", torch.cat([turned(f"attention.{n}") for n in "qkv"], dim=-1)
            yield f"{head}.attn.c_proj.{kind}", turned("attention.out")
            yield f"{head}.mlp.c_fc.{kind}", turned("mlp.up")
            yield f"{head}.mlp.c_proj.{kind}", turned("mlp.down")
    if "head.weight" in ours:
        yield "lm_head.weight", ours["head.weight"]


LLAMA_NAMES = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "attention.out":
               "self_attn.o_proj", "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
               "attention.v": "self_attn.v_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
               "mlp.down": "mlp.down_proj"}


def llama_pairs(theirs: nn.Module, ours: dict[str, Tensor], layers: int) -> Iterator[tuple[str, Tensor]]:
    yield "model.embed_tokens.weight", ours["embedding.token.weight"]
    yield "model.norm.weight", ours["final_norm.weight"]
    for i in range(layers):
        for name, their_name in LLAMA_NAMES.items():
            yield f"model.layers.{i}.{their_name}.weight", ours[f"layers.{i}.{name}.weight"]
    if "head.weight" in ours:
        yield "lm_head.weight", ours["head.weight"]


ORACLES = {"gpt": (gpt2, gpt2_pairs), "llama": (llama, llama_pairs)}


@pytest.mark.parametrize(("kind", "attention", "values"), [
    ("gpt", "eager", {}),
    ("gpt", "sdpa", {}),
    ("gpt", "eager", {"tied": False}),
    ("gpt", "eager", {"heads": 8}),
    # sdpa only: the eager attention of Llama takes its softmax in float32
    ("llama", "sdpa", {"tied": False}),
    ("llama", "sdpa", {"tied": True}),
    ("llama", "sdpa", {"tied": True, "kv_heads": 2}),
    ("llama", "sdpa", {"tied": False, "kv_heads": 1, "rope_theta": 500.0}),
])
def test_logits_loss_and_all_gradients_are_those_of_transformers(
    kind: str, attention: str, values: dict[str, Any]
) -> None:
    wish = model(kind=kind, **values)
    ours = network(wish)
    make, pairs = ORACLES[kind]
    theirs = make(wish, attention).eval()
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        weights = dict(pairs(theirs, dict(ours.named_parameters()), wish.layers))
        assert set(weights) == set(named)
        for name, weight in weights.items():
            named[name].copy_(weight)
    x, targets = tokens(wish)
    logits = theirs(input_ids=x).logits
    torch.testing.assert_close(ours(x), logits, **CLOSE)
    want = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = ours(x, targets)
    torch.testing.assert_close(loss, want, **CLOSE)
    want.backward()
    loss.backward()
    grads = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(ours.parameters()))
    for name, grad in pairs(theirs, grads, wish.layers):
        assert grad.abs().max() > 1e-6, name
        torch.testing.assert_close(grad, named[name].grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_no_token_sees_a_later_one(kind: str) -> None:
    wish = model(kind=kind, kv_heads=2)
    ours, (x, _) = network(wish), tokens(wish)
    before = ours(x)
    for at in (1, 5, wish.seq - 1):
        changed = x.clone()
        changed[:, at] = (changed[:, at] + 1) % wish.vocab
        after = ours(changed)
        assert torch.equal(after[:, :at], before[:, :at])
        assert ((after[:, at:] - before[:, at:]).abs().amax(-1) > 1e-9).all()


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_stages_one_after_the_other_are_the_whole(kind: str, tied: bool) -> None:
    wish = model(kind=kind, tied=tied)
    ours, (x, targets) = network(wish), tokens(wish)
    stages = [Transformer(wish, range(0, 1), True, False), Transformer(wish, range(1, 2), False, False),
              Transformer(wish, range(2, 3), False, True)]
    y = x
    for stage in stages:
        stage.double().load_state_dict({n: p for n, p in ours.state_dict().items() if n in stage.state_dict()})
        y = stage(y, targets if stage.last else None)
    assert torch.equal(y, ours(x, targets))


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_dropout_is_on_with_a_draw_and_off_without(kind: str) -> None:
    plain, dropping = (network(model(kind=kind, dropout=rate)) for rate in (0.0, 0.3))
    x, targets = tokens(plain.model)
    draw = draw_for(torch.arange(3), range(plain.model.seq), plain.model.seq, seed=1, step=1)
    want = plain(x, targets)
    assert torch.equal(dropping(x, targets), want)
    assert torch.equal(plain(x, targets, draw), want)
    dropped = dropping(x, targets, draw)
    assert not torch.isclose(dropped, want, rtol=1e-3)
    assert torch.equal(dropping(x, targets, draw), dropped)


def test_dropout_acts_on_the_embedding_and_on_both_residuals_of_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from hpcpar.nn import transformer

    sites: list[str] = []
    true_dropout = transformer.dropout

    def noted(x: Tensor, drop: float, draw: Any, site: str) -> Tensor:
        sites.append(site)
        return true_dropout(x, drop, draw, site)

    monkeypatch.setattr(transformer, "dropout", noted)
    ours = network(model(dropout=0.1))
    x, targets = tokens(ours.model)
    ours(x, targets, draw_for(torch.arange(3), range(ours.model.seq), ours.model.seq, seed=1, step=1))
    assert sites == ["embedding"] + [f"layers.{i}.{part}" for i in range(3) for part in ("attention", "mlp")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_narrow_logits_is_taken_in_fp32(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    loss = cross_entropy(logits, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert loss.dtype == torch.float32
    want = cross_entropy(logits.double(), torch.tensor([[1, 2, 3], [4, 5, 6]]))
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
