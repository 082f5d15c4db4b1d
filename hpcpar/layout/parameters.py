"""The one table of parameters: name, global shape, first values, and how tensor parallelism cuts each.

The network, the trainer, the checkpoint and the planner all read this table; a test equates it with the network
built on the meta device. q, k, v and gate, up are stored apart, so that every shard is a box of a logical tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hpcpar.config.job import Model, required
from hpcpar.layout.boxes import Box, shard_units


@dataclass(frozen=True)
class Parameter:
    """One logical tensor of the model.

    `std` is the standard deviation of the first values, `fill` their mean (norm weights start at 1).
    `tp_dim` is the dim that tensor parallelism cuts, in `tp_units` indivisible pieces (heads, rows); None: replicated.
    `partial`: under sequence parallelism each tp rank sees only its tokens, so that the gradient of this replicated
    tensor is a partial sum; without the flag tp ranks would drift apart without an error.
    """

    name: str
    shape: tuple[int, ...]
    std: float = 0.0
    fill: float = 0.0
    tp_dim: int | None = None
    tp_units: int = 0
    partial: bool = False

    @property
    def numel(self) -> int:
        """Elements of the logical tensor."""
        return math.prod(self.shape)

    @property
    def decayed(self) -> bool:
        """Whether weight decay applies: to matrices, not to norms and biases."""
        return len(self.shape) > 1

    @property
    def layer(self) -> int | None:
        """Global layer number, or None outside the layers."""
        return int(self.name.split(".")[1]) if self.name.startswith("layers.") else None

    @property
    def unit(self) -> str:
        """The part of the network that it belongs to: "embedding", "layers.3", "final_norm" or "head"."""
        return ".".join(self.name.split(".")[:1 if self.layer is None else 2])

    def box(self, tp_size: int, tp_rank: int) -> Box:
        """Return the part that a tp rank holds."""
        offset, size = [0] * len(self.shape), list(self.shape)
        if self.tp_dim is not None:
            unit = self.shape[self.tp_dim] // self.tp_units
            first, count = shard_units(self.tp_units, tp_size, tp_rank)
            offset[self.tp_dim], size[self.tp_dim] = first * unit, count * unit
        return Box(tuple(offset), tuple(size))

    def local_shape(self, tp_size: int, tp_rank: int) -> tuple[int, ...]:
        """Return the shape that a tp rank allocates: its box, vocabulary rows padded to be equal and a multiple of 8.

        Matrix units want multiples of 8; 53,228 rows over 8 ranks are 6653.5 each. Padding rows lie after the box.
        """
        size = list(self.box(tp_size, tp_rank).size)
        if self.tp_dim is not None and self.shape[self.tp_dim] % (8 * tp_size) and self.is_vocabulary:
            size[self.tp_dim] = -(-self.shape[self.tp_dim] // (8 * tp_size)) * 8
        return tuple(size)

    @property
    def is_vocabulary(self) -> bool:
        """Whether the rows are the vocabulary's."""
        return self.name in ("embedding.token.weight", "head.weight")

    def shared_by(self, tp_size: int) -> int:
        """Return how many tp ranks hold the same piece of a cut tensor (kv heads fewer than tp ranks)."""
        return 1 if self.tp_dim is None else max(1, tp_size // self.tp_units)


def parameter_table(model: Model) -> tuple[Parameter, ...]:
    """List the parameters of a resolved model, in the order of the forward pass.

    Residual outputs start with std / sqrt(2 x layers), so that the residual stream's variance does not grow with
    depth (GPT-2, section 2.3). Cost: about 12 small objects a layer.
    """
    hidden, vocab, std = model.hidden, model.vocab, model.init_std
    table = [Parameter("embedding.token.weight", (vocab, hidden), std, tp_dim=0, tp_units=vocab)]
    if model.kind == "gpt":
        table.append(Parameter("embedding.position.weight", (model.seq, hidden), std, partial=True))
    for layer in range(model.layers):
        table += _layer(model, f"layers.{layer}")
    table += _norm(model, "final_norm")
    if not model.tied:
        table.append(Parameter("head.weight", (vocab, hidden), std, tp_dim=0, tp_units=vocab))
    return tuple(table)


def _layer(model: Model, layer: str) -> list[Parameter]:
    hidden, ffn, heads, kv_heads = model.hidden, required(model.ffn), model.heads, required(model.kv_heads)
    kv_width = hidden // heads * kv_heads
    out_std = model.init_std / math.sqrt(2 * model.layers)
    biased = model.kind == "gpt"

    def column(name: str, rows: int, units: int) -> list[Parameter]:
        weight = Parameter(f"{layer}.{name}.weight", (rows, hidden), model.init_std, tp_dim=0, tp_units=units)
        bias = Parameter(f"{layer}.{name}.bias", (rows,), tp_dim=0, tp_units=units)
        return [weight, bias] if biased else [weight]

    def row(name: str, columns: int, units: int) -> list[Parameter]:
        weight = Parameter(f"{layer}.{name}.weight", (hidden, columns), out_std, tp_dim=1, tp_units=units)
        bias = Parameter(f"{layer}.{name}.bias", (hidden,), partial=True)
        return [weight, bias] if biased else [weight]

    attention = [*column("attention.q", hidden, heads), *column("attention.k", kv_width, kv_heads),
                 *column("attention.v", kv_width, kv_heads), *row("attention.out", hidden, heads)]
    gate = [] if biased else column("mlp.gate", ffn, ffn)
    mlp = [*gate, *column("mlp.up", ffn, ffn), *row("mlp.down", ffn, ffn)]
    return [*_norm(model, f"{layer}.attention_norm"), *attention, *_norm(model, f"{layer}.mlp_norm"), *mlp]


def _norm(model: Model, name: str) -> list[Parameter]:
    weight = Parameter(f"{name}.weight", (model.hidden,), fill=1.0, partial=True)
    bias = Parameter(f"{name}.bias", (model.hidden,), partial=True)
    return [weight, bias] if model.kind == "gpt" else [weight]
