"""GPT-2 of Hugging Face transformers, of the benchmark's shape, in a loop of Accelerate; one process."""

from __future__ import annotations

import torch.nn.functional as F
from accelerate import Accelerator
from gpt import adamw
from transformers import GPT2Config, GPT2LMHeadModel
from work import CLIP, HEADS, HIDDEN, LAYERS, SEQ, VOCAB, Step, rows


def open_program(tp: int, pp: int, dp: int, batch: int, zero: int) -> Step:
    """Return the training step."""
    assert tp == pp == dp == 1
    shape = GPT2Config(vocab_size=VOCAB, n_positions=SEQ, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS,
                       activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                       use_cache=False, bos_token_id=0, eos_token_id=0)
    accelerator = Accelerator(cpu=True)
    network = GPT2LMHeadModel._from_config(shape, attn_implementation="sdpa")
    model, optimizer = accelerator.prepare(network, adamw(network))

    def step(number: int) -> float:
        mine = rows(number * batch, batch)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(mine[:, :-1]).logits.flatten(0, 1), mine[:, 1:].flatten())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return float(loss.detach())

    return step
