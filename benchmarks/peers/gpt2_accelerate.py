"""GPT-2 of Hugging Face transformers, of the benchmark's shape, in a loop of Accelerate; one process."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from gpt import adamw
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from work import CLIP, HEADS, HIDDEN, LAYERS, SEQ, VOCAB, Step, Weights, Work, rows

OUTSIDE = {"transformer.wte": "embedding.token", "transformer.wpe": "embedding.position",
           "transformer.ln_f": "final_norm", "lm_head": "embedding.token"}
LAYER = {"ln_1": ["attention_norm"], "attn.c_attn": ["attention.q", "attention.k", "attention.v"],
         "attn.c_proj": ["attention.out"], "ln_2": ["mlp_norm"], "mlp.c_fc": ["mlp.up"], "mlp.c_proj": ["mlp.down"]}


def open_program(work: Work, weights: Weights) -> Step:
    """Return the training step."""
    assert work.tp == work.pp == work.dp == 1
    shape = GPT2Config(vocab_size=VOCAB, n_positions=SEQ, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS,
                       activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                       use_cache=False, bos_token_id=0, eos_token_id=0)
    accelerator = Accelerator(cpu=True)
    network = GPT2LMHeadModel._from_config(shape, attn_implementation="sdpa")
    network.load_state_dict({name: gpt2_weight(name, weights) for name in network.state_dict()})
    model, optimizer = accelerator.prepare(network, adamw(network))

    def step(number: int) -> float:
        mine = rows(number * work.batch, work.batch)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(mine[:, :-1]).logits.flatten(0, 1), mine[:, 1:].flatten())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return float(loss.detach())

    return step


def gpt2_weight(name: str, weights: Weights) -> Tensor:
    """The weight of this name in GPT-2, where q, k, v are one matrix, and all matrices of layers are [in, out]."""
    *path, kind = name.split(".")
    if path[:2] != ["transformer", "h"]:
        return weights[f"{OUTSIDE['.'.join(path)]}.{kind}"]
    whole = torch.cat([weights[f"layers.{path[2]}.{part}.{kind}"] for part in LAYER[".".join(path[3:])]])
    return whole.T if whole.dim() > 1 else whole
