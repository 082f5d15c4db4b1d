"""Recompute in backward instead of keeping activations: nothing, the attention block, or the whole layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hpcpar.nn.dropout import Draw
from hpcpar.nn.transformer import Block, Transformer


def apply_recompute(stage: Transformer, mode: str, overlapped: bool) -> None:
    """Set what a stage recomputes, in place.

    "selective" repeats q, k, v and the attention between its exchanges (no communication), or where these are
    `overlapped` with the products of q, k, v and the output, the attention between those; "full" repeats the layer,
    exchanges included, and keeps only its input. Nothing random has state here (dropout is a hash), so no generator
    is saved. Source: Korthikanti et al. 2022, arXiv 2205.05198, section 5.
    """
    assert mode in ("none", "selective", "full"), f'"{mode}" is chosen by the planner before'
    if mode == "full":
        stage.run_block = _recomputed_block
    elif mode == "selective":
        for block in stage.blocks():
            if overlapped:
                block.attention.mix = _Recomputed(block.attention.mix)
            else:
                block.attention.compute = _Recomputed(block.attention.compute)


def _recomputed_block(block: Block, x: Tensor, rotary: Tensor | None, draw: Draw | None) -> Tensor:
    out: Tensor = checkpoint(block, x, rotary, draw, use_reentrant=False, preserve_rng_state=False)
    return out


class _Recomputed:
    """A function whose activations are recomputed."""

    def __init__(self, compute: Any):
        self.compute = compute

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        out: Tensor = checkpoint(self.compute, *inputs, use_reentrant=False, preserve_rng_state=False)
        return out
