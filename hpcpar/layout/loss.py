"""How the loss cuts a microbatch's tokens: logits stand in memory a chunk of tokens at a time."""

from __future__ import annotations

import math

CHUNK_BYTES = 1 << 24  # of fp32 logits: what a cache may still hold, and enough for a full-speed product
LEAST_TOKENS = 256  # below that a product with a wide vocabulary reads its weights more than it computes


def loss_chunks(tokens: int, rows: int) -> list[int]:
    """Return how many tokens each chunk has, for `rows` logits a token (padding included, so that tp ranks agree)."""
    most = max(LEAST_TOKENS, CHUNK_BYTES // (4 * rows))
    num = math.ceil(tokens / most)
    return [tokens * (i + 1) // num - tokens * i // num for i in range(num)]
