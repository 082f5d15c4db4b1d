"""One transformer for the GPT and Llama families, whole or a pipeline stage of it; it knows nothing of ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from hpcpar.config.job import Model, required
from hpcpar.nn.attention import Attention, Exchange, identity, rotary_table
from hpcpar.nn.dropout import Draw, dropout
from hpcpar.nn.linear import Linear, Products, Table, Vocabulary, project


def make_norm(model: Model) -> nn.Module:
    """Make the family's norm over the hidden dim."""
    return nn.LayerNorm(model.hidden, eps=1e-5) if model.kind == "gpt" else nn.RMSNorm(model.hidden, eps=1e-5)


def cross_entropy(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Return the mean over tokens of -log softmax(logits)[target]; logits [batch, seq, vocab], in fp32 or better.

    The gradient is also that of z_loss x mean of log-normaliser squared, which keeps logits from drifting; the value
    is not, so that losses stay comparable. Source: Chowdhery et al. 2022, arXiv 2204.02311, section 5.
    """
    wide = logits.float() if logits.element_size() < 4 else logits
    loss = F.cross_entropy(wide.flatten(0, 1), targets.flatten())
    if not z_loss:
        return loss
    penalty = z_loss * wide.logsumexp(-1).square().mean()
    return loss + (penalty - penalty.detach())


def head_loss(x: Tensor, scores: Vocabulary, targets: Tensor, factor: float, z_loss: float) -> Tensor:
    """Return factor x the mean loss of x [batch, seq, hidden], scored by a matrix [vocab, hidden]."""
    return cross_entropy(scores.score(x), targets, z_loss) * factor


def gelu(up: Tensor) -> Tensor:
    """GELU by its tanh form, as GPT has it. Source: Hendrycks and Gimpel 2016, arXiv 1606.08415."""
    return F.gelu(up, approximate="tanh")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU of one product gates the other. Source: Shazeer 2020, arXiv 2002.05202."""
    return F.silu(gate) * up


class MLP(nn.Module):
    """GELU (gpt) or SwiGLU (llama) between two matrices; `enter` and `leave` as in Attention."""

    def __init__(self, model: Model):
        super().__init__()
        ffn, biased = required(model.ffn), model.kind == "gpt"
        self.gate = None if biased else Linear(model.hidden, ffn, bias=False)
        self.up = Linear(model.hidden, ffn, bias=biased)
        self.down = Linear(ffn, model.hidden, bias=biased)
        self.project: Products = project
        self.enter: Exchange = identity
        self.leave: Exchange = identity
        self.compute: Exchange = self.transform
        self.activate: Callable[..., Tensor] = gelu if self.gate is None else swiglu

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, seq(/tp), hidden] to the same shape."""
        y = self.leave(self.compute(self.enter(x)))
        return y if self.down.bias is None else y + self.down.bias

    def transform(self, x: Tensor) -> Tensor:
        """Map [batch, seq, hidden] to this rank's partial output of the same shape."""
        first = (self.up,) if self.gate is None else (self.gate, self.up)
        return self.down.without_bias(self.activate(*self.project(x, *first)))


class Block(nn.Module):
    """A layer: attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, model: Model, number: int):
        super().__init__()
        self.name, self.drop = f"layers.{number}", model.dropout
        self.attention_norm = make_norm(model)
        self.attention = Attention(model)
        self.mlp_norm = make_norm(model)
        self.mlp = MLP(model)

    def forward(self, x: Tensor, rotary: Tensor | None, draw: Draw | None) -> Tensor:
        """Map [batch, seq(/tp), hidden] to the same shape."""
        x = x + self._thin(self.attention(self.attention_norm(x), rotary), draw, "attention")
        return x + self._thin(self.mlp(self.mlp_norm(x)), draw, "mlp")

    def _thin(self, x: Tensor, draw: Draw | None, site: str) -> Tensor:
        # the name is looked at only where it is needed: a compiler would make every layer's code its own
        return x if draw is None else dropout(x, self.drop, draw, f"{self.name}.{site}")


def look_up(table: Vocabulary, tokens: Tensor) -> Tensor:
    """Map tokens [batch, seq] to their rows [batch, seq, hidden]."""
    return table.rows(tokens, table.weight)


class Embedding(nn.Module):
    """Token embedding, and learned positions where the family has them."""

    def __init__(self, model: Model, with_position: bool):
        super().__init__()
        self.token = Vocabulary(model.vocab, model.hidden)
        self.position = Table(model.seq, model.hidden) if with_position else None
        self.lookup: Callable[[Vocabulary, Tensor], Tensor] = look_up
        self.first_position = 0  # of this rank's tokens, under sequence parallelism
        self.grad_factor = model.embedding_grad

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [batch, seq] to [batch, seq(/tp), hidden]."""
        x = self.lookup(self.token, tokens)
        if self.grad_factor != 1:
            # the value stays, bit by bit: only the gradient shrinks. Source: GLM-130B, arXiv 2210.02414, section 2.2
            x = x.detach() + self.grad_factor * (x - x.detach())
        if self.position is None:
            return x
        return x + self.position.weight[self.first_position:self.first_position + x.shape[1]]


def run_unit(name: str, compute: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    """Compute a part of the network, named as its parameters are."""
    return compute(x, *rest)


class Transformer(nn.Module):
    """A range of layers; the first stage also embeds, the last also norms and scores.

    The parameters' names and shapes are those of `layout.parameters.parameter_table`, layers by global number.
    """

    def __init__(self, model: Model, layers: range, first: bool, last: bool):
        super().__init__()
        self.model = model
        if first or (last and model.tied):
            self.embedding = Embedding(model, with_position=first and model.kind == "gpt")
        self.layers = nn.ModuleDict({str(number): Block(model, number) for number in layers})
        if last:
            self.final_norm = make_norm(model)
        if last and not model.tied:
            self.head = Vocabulary(model.vocab, model.hidden)
        self.first, self.last = first, last
        self.enter_head: Exchange = identity
        self.vocab_rows = model.vocab  # rows of the local output matrix that are not padding
        self.head_loss: Callable[[Tensor, Vocabulary, Tensor, float], Tensor] = partial(head_loss, z_loss=model.z_loss)
        self.run_block: Callable[[Block, Tensor, Tensor | None, Draw | None], Tensor] = Block.__call__
        self.run: Callable[..., Tensor] = run_unit
        self._rotary: Tensor | None = None

    def forward(self, x: Tensor, targets: Tensor | None = None, draw: Draw | None = None,
                loss_factor: float = 1.0) -> Tensor:
        """Run this stage.

        First stage: x is tokens [batch, seq] int64; others: [batch, seq(/tp), hidden]. Returns activations
        [batch, seq(/tp), hidden]; on the last stage loss_factor x the mean loss if `targets` [batch, seq] are given,
        else logits [batch, seq, vocab(/tp)].
        """
        if self.first:
            x = dropout(self.run("embedding", self.embedding, x), self.model.dropout, draw, "embedding")
        rotary = self._rotary_for(x) if self.model.kind == "llama" else None
        for block in self.blocks():
            x = self.run(block.name, partial(self.run_block, block), x, rotary, draw)
        if not self.last:
            return x
        x = self.enter_head(self.run("final_norm", self.final_norm, x))
        return self.run("head", self.score, x, targets, loss_factor)

    def score(self, x: Tensor, targets: Tensor | None, loss_factor: float) -> Tensor:
        """Map the normed [batch, seq, hidden] to what `forward` returns on the last stage."""
        scores = self.embedding.token if self.model.tied else self.head
        if targets is None:
            return scores.score(x)[..., :self.vocab_rows]
        return self.head_loss(x, scores, targets, loss_factor)

    def units(self) -> list[str]:
        """Name what `forward` runs, in order."""
        return (["embedding"] if self.first else []) + [block.name for block in self.blocks()] \
            + (["final_norm", "head"] if self.last else [])

    def blocks(self) -> list[Block]:
        """List the layers held here, in order."""
        return cast(list[Block], list(self.layers.values()))

    def _rotary_for(self, x: Tensor) -> Tensor:
        if self._rotary is None:
            model = self.model
            self._rotary = rotary_table(model.seq, model.hidden // model.heads, model.rope_theta, x.device, x.dtype)
        return self._rotary
