"""How many operations a model costs, exactly and by the published formulas, and how long they last on paper.

Two countings are kept apart by name: `model` FLOPs are those of the mathematics (forward once, backward twice),
`hardware` FLOPs also count what recomputation repeats. Attention is counted in full, not by its causal half, as all
publications but one do. 1 PF-day = 8.64e19 FLOP.
"""

from __future__ import annotations

from hpcpar.config.job import Model, required

PF_DAY = 8.64e19
DAY = 86400.0


def layer_forward_flops(model: Model, tokens: float) -> float:
    """Return one layer's forward FLOPs: projections (grouped queries too), MLP (gated for llama), full attention."""
    hidden, kv_width = model.hidden, model.hidden // model.heads * required(model.kv_heads)
    matrices = 2 if model.kind == "gpt" else 3
    products = 2 * hidden * (2 * hidden + 2 * kv_width + matrices * required(model.ffn))
    return tokens * (products + 4 * model.seq * hidden)


def logits_forward_flops(model: Model, tokens: float) -> float:
    """Return the FLOPs of the output matrix, forward."""
    return 2.0 * tokens * model.hidden * model.vocab


def model_flops(model: Model, sequences: float) -> float:
    """Return a step's FLOPs without recomputation: forward, and backward at twice that."""
    tokens = sequences * model.seq
    return 3 * (model.layers * layer_forward_flops(model, tokens) + logits_forward_flops(model, tokens))


def attention_core_flops(model: Model, tokens: float) -> float:
    """Return the forward FLOPs of scores and weighted sums: what published selective recomputation repeats."""
    return 4.0 * tokens * model.seq * model.hidden


def recomputed_flops(model: Model, sequences: float, recompute: str, projections: bool = False) -> float:
    """Return the FLOPs that a step repeats; `projections`: "selective" repeats q, k, v and the output too."""
    tokens = sequences * model.seq
    if recompute in ("none", "offload"):
        return 0.0
    if recompute == "full":
        return model.layers * layer_forward_flops(model, tokens)
    kv_width = model.hidden // model.heads * required(model.kv_heads)
    beside = 2 * tokens * model.hidden * (2 * model.hidden + 2 * kv_width) if projections else 0.0
    return model.layers * (attention_core_flops(model, tokens) + beside)


def narayanan_parameters(layers: int, hidden: int, seq: int, vocab: int) -> float:
    """Return 12lh^2 (1 + 13/(12h) + (V+s)/(12lh)). Source: Narayanan et al. 2021, arXiv 2104.04473, equation 2."""
    return 12.0 * layers * hidden**2 * (1 + 13 / (12 * hidden) + (vocab + seq) / (12 * layers * hidden))


def narayanan_flops(layers: int, hidden: int, seq: int, vocab: int, batch: int, recompute: bool = True) -> float:
    """Return a step's FLOPs: 96Bslh^2 (1 + s/6h + V/16lh) with full recomputation, else 72Bslh^2 (1 + s/6h + V/12lh).

    The logits are never recomputed. Source: Narayanan et al. 2021, arXiv 2104.04473, equation 3.
    """
    factor, share = (96, 16) if recompute else (72, 12)
    return factor * batch * seq * layers * hidden**2 * (1 + seq / (6 * hidden) + vocab / (share * layers * hidden))


def train_flops(parameters: float, tokens: float, recompute: bool = False) -> float:
    """Return 6PT, or 8PT with the recomputed forward. Source: Narayanan et al. 2021, arXiv 2104.04473, section 5.1."""
    return (8.0 if recompute else 6.0) * parameters * tokens


def pf_days(flops: float) -> float:
    """Return FLOPs in petaflop-days."""
    return flops / PF_DAY


def train_days(flops: float, num_gpus: int, flops_per_gpu: float) -> float:
    """Return the days that `num_gpus` need at a sustained rate in FLOP/s each."""
    return flops / (num_gpus * flops_per_gpu) / DAY
