"""How the loss cuts a microbatch's tokens: logits stand in memory a chunk of tokens at a time."""

from __future__ import annotations

import math

CHUNK_BYTES = 1 << 24  # of fp32 logits: what a cache may still hold, and enough for a full-speed product
LEAST_TOKENS = 256  # below that a product with a wide vocabulary reads its weights more than it computes
LEAST_TOKENS_16_BIT = 2048  # 16 bits are for GPUs: below that a product does not fill one, and launches are felt


def loss_chunks(tokens: int, rows: int, element_bytes: int) -> list[int]:
    """Return how many tokens each chunk has, for `rows` logits a token (padding included, so that tp ranks agree).

    `element_bytes` are those of a weight.
    """
    least = LEAST_TOKENS if element_bytes > 2 else LEAST_TOKENS_16_BIT
    most = max(least, CHUNK_BYTES // (4 * rows))
    num = math.ceil(tokens / most)
    return [tokens * (i + 1) // num - tokens * i // num for i in range(num)]
