"""Text from a checkpoint, in one process."""

from __future__ import annotations

import torch

from hpcpar.data.tokenizer import Tokenizer
from hpcpar.nn.transformer import Transformer

TEMPERATURE = 0.8  # below 1 the likelier tokens come oftener: what a small model says reads better


@torch.no_grad()
def generate(network: Transformer, tokenizer: Tokenizer, prompt: str, num_tokens: int) -> str:
    """Continue a prompt by sampling, the same text every time. Cost: one forward a token."""
    draw = torch.Generator().manual_seed(1)
    ids = [tokenizer.end_token, *tokenizer.encode_batch([prompt])[0].tolist()]
    if ids[-1] == tokenizer.end_token and len(ids) > 1:
        ids.pop()
    known = tokenizer.vocab_size
    for _ in range(num_tokens):
        window = torch.tensor([ids[-network.model.seq:]])
        logits = network(window)[0, -1, :known]
        ids.append(int(torch.multinomial((logits / TEMPERATURE).softmax(0), 1, generator=draw)))
        if ids[-1] == tokenizer.end_token:
            break
    return tokenizer.decode([i for i in ids if i != tokenizer.end_token])
