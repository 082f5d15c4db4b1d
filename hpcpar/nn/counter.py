"""Random numbers as a pure function of (key, element): the same on any layout, device and order of evaluation.

Only integer arithmetic decides the bits. A generator's state would depend on who drew what before, and a logarithm's
last bit on whether an element fell in a vector loop or in its tail.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_CHUNK = 1 << 18  # elements at a time: temporaries stay in cache


def make_key(*parts: int | str) -> int:
    """Hash a tuple such as (seed, "dropout", step, layer) to a signed 64-bit key."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def mix(counters: Tensor) -> Tensor:
    """Scramble int64 counters in place: the finalizer of splitmix64 (Steele et al. 2014, section 4).

    Cost: about 8 integer operations an element.
    """
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        counters ^= _shifted(counters, shift)
        counters *= factor
    counters ^= _shifted(counters, 31)
    return counters


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Shift right logically: torch's >> on int64 copies the sign."""
    return (value >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def normal(key: int, elements: Tensor, std: float) -> Tensor:
    """Return normal float64 values for int64 element numbers (any shape), equal bit for bit everywhere.

    The sum of twelve 16-bit uniforms has variance 1 and is exact in float64; its tails end at 6 std, which suits
    first weights. Two counters an element and a key would repeat streams; three keys from one keep them apart.
    """
    flat = elements.reshape(-1)
    out = torch.empty(flat.shape, dtype=torch.float64, device=flat.device)
    low_lanes = 0x0000FFFF0000FFFF
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start:start + _CHUNK]
        lanes = torch.zeros_like(part)
        for stream in range(3):
            bits = mix((part * 3 + stream).mul_(-7046029254386353131).add_(key))
            lanes += bits & low_lanes
            lanes += _shifted(bits, 16).bitwise_and_(low_lanes)
        total = (lanes & 0xFFFFFFFF) + _shifted(lanes, 32)
        out[start:start + _CHUNK] = (total.double() - 6 * 65535) * (std / 65536)
    return out.reshape(elements.shape)


def keep_mask(key: int, elements: Tensor, drop: float) -> Tensor:
    """Return a bool mask that is False with probability `drop`, for int64 element numbers."""
    # the top bits of the scrambled counter, compared as signed numbers
    threshold = int(drop * 2**64) - 2**63
    return mix(elements.mul(-7046029254386353131).add_(key)) >= threshold
