"""The same GPT and Llama on one GPU in plain PyTorch (as nanoGPT and torchtitan do) and with Hugging Face; no hpcpar.

    PyTorch layers compiled   torch.compile of every layer and of the loss, as torchtitan does; autocast to bf16
    PyTorch model compiled    torch.compile of the whole model with its loss, as nanoGPT does; autocast to bf16
    Hugging Face               GPT2LMHeadModel or LlamaForCausalLM, scaled-dot-product attention; autocast to bf16

fp32 parameters, gradients and fused AdamW with clipping everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[Tensor], float]


class Layer(nn.Module):
    """A block of either family; q, k, v in one product, as both originals have them or may."""

    def __init__(self, kind: str, hidden: int, heads: int, ffn: int):
        super().__init__()
        gpt = kind == "gpt"
        self.gpt, self.heads = gpt, heads
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) if gpt else nn.RMSNorm(hidden, eps=1e-5) for _ in range(2))
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=gpt), nn.Linear(hidden, hidden, bias=gpt)
        self.up = nn.Linear(hidden, ffn if gpt else 2 * ffn, bias=gpt)
        self.down = nn.Linear(ffn, hidden, bias=gpt)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        batch, seq, hidden = x.shape
        q, k, v = (part.view(batch, seq, self.heads, -1).transpose(1, 2)
                   for part in self.qkv(self.norms[0](x)).split(hidden, -1))
        if cos is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).reshape(batch, seq, hidden))
        inner = self.up(self.norms[1](x))
        if self.gpt:
            return x + self.down(F.gelu(inner, approximate="tanh"))
        gate, up = inner.chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Plain(nn.Module):
    """The whole model and its loss."""

    def __init__(self, model: dict[str, Any]):
        super().__init__()
        hidden, kind = model["hidden"], model["kind"]
        self.token = nn.Embedding(model["vocab"], hidden)
        self.position = nn.Embedding(model["seq"], hidden) if kind == "gpt" else None
        self.layers = nn.ModuleList(Layer(kind, hidden, model["heads"], model.get("ffn", 4 * hidden))
                                    for _ in range(model["layers"]))
        self.norm = nn.LayerNorm(hidden) if kind == "gpt" else nn.RMSNorm(hidden, eps=1e-5)
        self.head = nn.Linear(hidden, model["vocab"], bias=False)
        if model["tied"]:
            self.head.weight = self.token.weight
        half = hidden // model["heads"] // 2
        angles = torch.arange(model["seq"])[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos().bfloat16() if kind == "llama" else None)
        self.register_buffer("sin", angles.sin().bfloat16() if kind == "llama" else None)
        self.loss = cross_entropy

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.token(tokens)
        if self.position is not None:
            x = x + self.position.weight[:x.shape[1]]
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.loss(self.head(self.norm(x)), targets)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def plain(model: dict[str, Any], microbatch: int, whole: bool) -> Step:
    """Build plain PyTorch's step, compiled layer by layer or as a whole."""
    torch._dynamo.reset()
    with torch.device("cuda"):
        network = Plain(model)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    if whole:
        network.compile()
    else:
        for layer in network.layers:
            layer.compile()
        network.loss = torch.compile(network.loss)
    return loop(network, microbatch, lambda rows: network(rows[:, :-1], rows[:, 1:]))


def hugging_face(model: dict[str, Any], microbatch: int) -> Step:
    """Build the step of transformers' model."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if model["kind"] == "gpt":
        config = GPT2Config(vocab_size=model["vocab"], n_positions=model["seq"], n_embd=model["hidden"],
                            n_layer=model["layers"], n_head=model["heads"], resid_pdrop=0.0, embd_pdrop=0.0,
                            attn_pdrop=0.0, attn_implementation="sdpa")
        kind: Any = GPT2LMHeadModel
    else:
        config = LlamaConfig(vocab_size=model["vocab"], hidden_size=model["hidden"], intermediate_size=model["ffn"],
                             num_hidden_layers=model["layers"], num_attention_heads=model["heads"],
                             max_position_embeddings=model["seq"], tie_word_embeddings=model["tied"],
                             attn_implementation="sdpa")
        kind = LlamaForCausalLM
    with torch.device("cuda"):
        network = kind(config)
    network.config.use_cache = False
    return loop(network, microbatch, lambda rows: network(input_ids=rows[:, :-1], labels=rows[:, :-1]).loss)


def loop(network: nn.Module, microbatch: int, loss_of: Callable[[Tensor], Tensor]) -> Step:
    """Build a plain training step around a loss."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(rows: Tensor) -> float:
        parts = rows.cuda(non_blocking=True).split(microbatch)
        total = torch.zeros((), device="cuda")
        for part in parts:
            with torch.autocast("cuda", torch.bfloat16):
                loss = loss_of(part) / len(parts)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()

    return step


PEERS: dict[str, Callable[[dict[str, Any], int], Step]] = {
    "PyTorch layers compiled": lambda model, microbatch: plain(model, microbatch, whole=False),
    "PyTorch model compiled": lambda model, microbatch: plain(model, microbatch, whole=True),
    "Hugging Face": hugging_face,
}
