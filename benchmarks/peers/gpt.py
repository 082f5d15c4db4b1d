"""The GPT of the plain PyTorch peers."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from work import BETAS, HEADS, HIDDEN, LAYERS, LEARNING_RATE, SEQ, VOCAB, WEIGHT_DECAY, Weights

OUTSIDE = {"token": "embedding.token", "position": "embedding.position", "norm": "final_norm",
           "head": "embedding.token"}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, seq = x.shape[:2]
        q, k, v = (p(x).view(batch, seq, -1, HIDDEN // HEADS).transpose(1, 2) for p in (self.q, self.k, self.v))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(heads.transpose(1, 2).reshape(batch, seq, -1))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(HIDDEN), Attention()
        self.mlp_norm, self.mlp = nn.LayerNorm(HIDDEN), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """A pipeline stage, or with one stage the whole model; it starts from hpcpar's weights."""

    def __init__(self, stage: int, num_stages: int, weights: Weights):
        super().__init__()
        self.first, self.last = stage == 0, stage == num_stages - 1
        if self.first:
            self.token, self.position = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(SEQ, HIDDEN)
        num_layers = LAYERS // num_stages
        self.blocks = nn.ModuleList(Block() for _ in range(num_layers))
        if self.last:
            self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        named = partial(hpcpars_name, first_layer=stage * num_layers)
        self.load_state_dict({own: weights[named(own)] for own in self.state_dict()})
        self.tie()

    def tie(self) -> None:
        if self.first and self.last:
            self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = self.token(x) + self.position(torch.arange(SEQ))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) if self.last else x


def hpcpars_name(own: str, first_layer: int) -> str:
    """hpcpar's name of a parameter of the stage that starts with this layer."""
    part, *rest = own.split(".")
    if part == "blocks":
        return ".".join(["layers", str(first_layer + int(rest[0])), *rest[1:]])
    return ".".join([OUTSIDE[part], *rest])


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """The optimizer of all peers: weight decay of matrices, as hpcpar's."""
    groups: list = [{"params": [p for p in model.parameters() if (p.dim() > 1) == matrices], "weight_decay": decay}
                    for matrices, decay in ((True, WEIGHT_DECAY), (False, 0.0))]
    return torch.optim.AdamW(groups, LEARNING_RATE, BETAS, fused=True)
