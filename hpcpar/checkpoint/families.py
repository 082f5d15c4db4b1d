"""Our models in the words of Hugging Face's GPT-2 and Llama: names, shapes and config.json, both ways; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcpar.config.job import Model
from hpcpar.config.load import job_from_tables
from hpcpar.config.resolve import resolve
from hpcpar.errors import UserError
from hpcpar.layout.parameters import parameter_table

Array = np.ndarray[Any, Any]
NORM_EPS = 1e-5  # of both families here
EITHER_GELU = ("gelu_new", "gelu_pytorch_tanh")  # two names of the tanh form


@dataclass(frozen=True)
class Foreign:
    """One tensor of theirs: ours one below the other, and turned where GPT-2 keeps [in, out]."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]  # our tensors by name, in order
    turned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Its own shape."""
        rows = sum(shape[0] for shape in self.shapes.values())
        whole = (rows, *next(iter(self.shapes.values()))[1:])
        return whole[::-1] if self.turned else whole

    def join(self, ours: list[Array]) -> Array:
        """Return their tensor."""
        whole = ours[0] if len(ours) == 1 else np.concatenate(ours)
        return np.ascontiguousarray(whole.T if self.turned else whole)

    def part(self, theirs: Array) -> dict[str, Array]:
        """Return our tensors by name."""
        whole, found, row = theirs.T if self.turned else theirs, {}, 0
        for name, shape in self.shapes.items():
            found[name] = np.ascontiguousarray(whole[row : row + shape[0]])
            row += shape[0]
        return found


def foreign_tensors(model: Model) -> list[Foreign]:
    """List their tensors for a resolved model; every one of ours is in exactly one of them."""
    shapes = {p.name: p.shape for p in parameter_table(model)}
    root, layers, table = _GPT2 if model.kind == "gpt" else _LLAMA
    found = [_foreign(shapes, f"{root}.{theirs}", (ours,)) for theirs, ours in _OUTSIDE[model.kind]]
    for number in range(model.layers):
        for theirs, ours in table.items():
            found.append(_foreign(shapes, f"{root}.{layers}.{number}.{theirs}",
                                  tuple(f"layers.{number}.{name}" for name in ours)))
    if not model.tied:
        found.append(Foreign("lm_head.weight", {"head.weight": shapes["head.weight"]}))
    if sorted(name for f in found for name in f.shapes) != sorted(shapes):
        raise AssertionError("the tables above do not cover the model")
    return found


def _foreign(shapes: Mapping[str, tuple[int, ...]], theirs: str, ours: tuple[str, ...]) -> Foreign:
    # GPT-2's matrices are Conv1D: [in, out]
    turned = ".attn.c_" in theirs or ".mlp.c_" in theirs
    return Foreign(theirs, {name: shapes[name] for name in ours}, turned and theirs.endswith("weight"))


_OUTSIDE = {
    "gpt": (("wte.weight", "embedding.token.weight"), ("wpe.weight", "embedding.position.weight"),
            ("ln_f.weight", "final_norm.weight"), ("ln_f.bias", "final_norm.bias")),
    "llama": (("embed_tokens.weight", "embedding.token.weight"), ("norm.weight", "final_norm.weight")),
}
_GPT2 = ("transformer", "h", {
    f"{theirs}.{what}": tuple(f"{name}.{what}" for name in ours)
    for theirs, ours in (("ln_1", ("attention_norm",)), ("attn.c_attn", ("attention.q", "attention.k", "attention.v")),
                         ("attn.c_proj", ("attention.out",)), ("ln_2", ("mlp_norm",)), ("mlp.c_fc", ("mlp.up",)),
                         ("mlp.c_proj", ("mlp.down",))) for what in ("weight", "bias")})
_LLAMA = ("model", "layers", {
    f"{theirs}.weight": (f"{name}.weight",)
    for theirs, name in (("input_layernorm", "attention_norm"), ("self_attn.q_proj", "attention.q"),
                         ("self_attn.k_proj", "attention.k"), ("self_attn.v_proj", "attention.v"),
                         ("self_attn.o_proj", "attention.out"), ("post_attention_layernorm", "mlp_norm"),
                         ("mlp.gate_proj", "mlp.gate"), ("mlp.up_proj", "mlp.up"), ("mlp.down_proj", "mlp.down"))})


def to_config(model: Model, end_token: int | None, dtype: str) -> dict[str, Any]:
    """Return config.json of a resolved model. Raises: UserError for what the family's layout cannot say."""
    common = {"vocab_size": model.vocab, "initializer_range": model.init_std, "tie_word_embeddings": model.tied,
              "bos_token_id": end_token, "eos_token_id": end_token, "dtype": dtype, "torch_dtype": dtype}
    if model.kind == "llama":
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **common, "hidden_act": "silu",
                "hidden_size": model.hidden, "intermediate_size": model.ffn, "num_hidden_layers": model.layers,
                "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads,
                "head_dim": model.hidden // model.heads, "max_position_embeddings": model.seq,
                "rms_norm_eps": NORM_EPS, "rope_theta": model.rope_theta, "rope_scaling": None,
                "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
                "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "pad_token_id": None}
    if model.kv_heads != model.heads:
        raise UserError("model.kv_heads", f"is {model.kv_heads} of {model.heads} heads, and GPT-2's layout fuses q, k "
                        "and v of as many heads", "only kind = \"llama\" can be exported with fewer kv heads")
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **common, "activation_function": "gelu_new",
            "n_embd": model.hidden, "n_inner": model.ffn, "n_layer": model.layers, "n_head": model.heads,
            "n_positions": model.seq, "layer_norm_epsilon": NORM_EPS, "embd_pdrop": model.dropout,
            "resid_pdrop": model.dropout, "attn_pdrop": 0.0, "scale_attn_weights": True}


def from_config(config: Mapping[str, Any], where: str) -> Model:
    """Return the resolved model that a config.json describes.

    Raises: UserError naming the first setting that this network does not have: weights that load are not enough.
    """
    kind = {"gpt2": "gpt", "llama": "llama"}.get(str(config.get("model_type")))
    if kind is None:
        raise UserError(where, f"model_type is {config.get('model_type')!r}", "gpt2 and llama can be imported")
    if config.get("quantization_config"):
        raise UserError(where, "the weights are quantized", "import the unquantized model")
    try:
        wish = _gpt2_wish(config, where) if kind == "gpt" else _llama_wish(config, where)
    except KeyError as error:
        raise UserError(where, f"has no {error}", "give a complete config.json") from error
    model = {**wish, "kind": kind, "vocab": config["vocab_size"], "init_std": config.get("initializer_range", 0.02)}
    return resolve(job_from_tables({"model": {k: v for k, v in model.items() if v is not None}})).model


def _gpt2_wish(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    _must(config, where, "activation_function", EITHER_GELU, "gelu_new")
    _must(config, where, "layer_norm_epsilon", (NORM_EPS,), NORM_EPS)
    _must(config, where, "scale_attn_weights", (True,), True)
    _must(config, where, "scale_attn_by_inverse_layer_idx", (False,), False)
    _must(config, where, "add_cross_attention", (False,), False)
    return {"layers": config["n_layer"], "hidden": config["n_embd"], "heads": config["n_head"],
            "ffn": config.get("n_inner"), "seq": config["n_positions"], "dropout": config.get("resid_pdrop", 0.1),
            "tied": config.get("tie_word_embeddings", True)}


def _llama_wish(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    _must(config, where, "hidden_act", ("silu",), "silu")
    _must(config, where, "rms_norm_eps", (NORM_EPS,), 1e-6)
    _must(config, where, "attention_bias", (False,), False)
    _must(config, where, "mlp_bias", (False,), False)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    _must(config, where, "head_dim", (hidden // heads, None), None)
    rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    _must({"rope_type": rope_type}, where, "rope_type", ("default",), "default")
    return {"layers": config["num_hidden_layers"], "hidden": hidden, "heads": heads,
            "kv_heads": config.get("num_key_value_heads"), "ffn": config["intermediate_size"],
            "seq": config["max_position_embeddings"], "tied": config.get("tie_word_embeddings", False),
            "rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))}


def _must(config: Mapping[str, Any], where: str, key: str, legal: tuple[Any, ...], default: Any) -> None:
    """Refuse a setting that this network computes otherwise; `default` is theirs for one that is not written."""
    found = config.get(key, default)
    if found not in legal:
        raise UserError(where, f"{key} is {found!r}", f"this network has {legal[0]!r}")

