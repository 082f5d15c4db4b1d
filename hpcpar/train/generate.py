"""Text from a checkpoint, in one process."""

from __future__ import annotations

import torch

from hpcpar.data.tokenizer import Tokenizer
from hpcpar.nn.transformer import Transformer


@torch.no_grad()
def generate(network: Transformer, tokenizer: Tokenizer, prompt: str, num_tokens: int, temperature: float,
             seed: int) -> str:
    """Continue a prompt by sampling; temperature 0 takes the likeliest token. Cost: one forward a token."""
    draw = torch.Generator().manual_seed(seed)
    ids = [tokenizer.end_token, *tokenizer.encode_batch([prompt])[0].tolist()]
    if ids[-1] == tokenizer.end_token and len(ids) > 1:
        ids.pop()
    known = tokenizer.vocab_size
    for _ in range(num_tokens):
        window = torch.tensor([ids[-network.model.seq:]])
        logits = network(window)[0, -1, :known]
        if temperature == 0:
            ids.append(int(logits.argmax()))
        else:
            ids.append(int(torch.multinomial((logits / temperature).softmax(0), 1, generator=draw)))
        if ids[-1] == tokenizer.end_token:
            break
    return tokenizer.decode([i for i in ids if i != tokenizer.end_token])
