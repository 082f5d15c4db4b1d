"""Causal self-attention with grouped queries and optional rotary positions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcpar.config.job import Model, required
from hpcpar.nn.linear import Linear, Products, project

Exchange = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """Pass x on: what a block's callables do on one rank."""
    return x


def rotary_table(seq: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return cos and sin of every position's rotation: [2, seq, head_dim / 2]. Source: Su et al., arXiv 2104.09864."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(seq, dtype=torch.float64)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin())).to(device=device, dtype=dtype)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + head_dim/2) of x [batch, heads, seq, head_dim] by their position's angle."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def to_heads(x: Tensor, head_dim: int) -> Tensor:
    """Map [batch, seq, heads x head_dim] to [batch, heads, seq, head_dim]."""
    batch, seq = x.shape[:2]
    return x.view(batch, seq, -1, head_dim).transpose(1, 2)


def from_heads(x: Tensor) -> Tensor:
    """Map [batch, heads, seq, head_dim] to [batch, seq, heads x head_dim]."""
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Attention over heads whose number falls out of the local weights: the module does not know tp.

    `enter` and `leave` exchange activations around it: identity on one rank, and where the products themselves
    exchange (`project`, and `out`'s). Between them tokens may lie in any order
    that `to_heads` and `from_heads` agree on. The output bias is added after `leave`, once, because before it every tp
    rank would add it to its partial sum.
    """

    def __init__(self, model: Model):
        super().__init__()
        kv_width = model.hidden // model.heads * required(model.kv_heads)
        biased = model.kind == "gpt"
        self.head_dim, self.qk_norm = model.hidden // model.heads, model.qk_norm
        self.q = Linear(model.hidden, model.hidden, bias=biased)
        self.k = Linear(model.hidden, kv_width, bias=biased)
        self.v = Linear(model.hidden, kv_width, bias=biased)
        self.out = Linear(model.hidden, model.hidden, bias=biased)
        self.project: Products = project
        self.enter: Exchange = identity
        self.leave: Exchange = identity
        self.to_heads: Callable[[Tensor, int], Tensor] = to_heads
        self.from_heads: Exchange = from_heads
        self.compute: Callable[[Tensor, Tensor | None], Tensor] = self.attend
        self.mix: Callable[..., Tensor] = self.mix_tokens

    def forward(self, x: Tensor, rotary: Tensor | None) -> Tensor:
        """Map [batch, seq(/tp), hidden] to the same shape."""
        y = self.leave(self.compute(self.enter(x), rotary))
        return y if self.out.bias is None else y + self.out.bias

    def attend(self, x: Tensor, rotary: Tensor | None) -> Tensor:
        """Map the tokens that `enter` gave, [..., hidden], to this rank's partial output of the same shape."""
        return self.out.without_bias(self.mix(*self.project(x, self.q, self.k, self.v), rotary))

    def mix_tokens(self, q: Tensor, k: Tensor, v: Tensor, rotary: Tensor | None) -> Tensor:
        """Map queries, keys and values [..., heads x head_dim] to weighted sums of values, shaped as the queries."""
        q, k, v = (self.to_heads(y, self.head_dim) for y in (q, k, v))
        if self.qk_norm:  # without weights, so that nothing is added to a checkpoint; rotation keeps the length
            q, k = (F.rms_norm(each, (self.head_dim,), eps=1e-5) for each in (q, k))
        if rotary is not None:
            seq = q.shape[2]
            q, k = rotate(q, rotary[:, :seq]), rotate(k, rotary[:, :seq])
        grouped = k.shape[1] != q.shape[1]
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.from_heads(heads)
