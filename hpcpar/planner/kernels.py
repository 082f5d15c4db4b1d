"""How long one kernel takes: matrix products by tiles and waves, attention, and what only moves memory."""

from __future__ import annotations

import math
from functools import lru_cache

from hpcpar.planner.hardware import Machine

ALIGNED = {64: 1.0, 32: 0.97, 16: 0.92, 8: 0.8, 4: 0.6, 2: 0.4, 1: 0.2}
SMALLER_TILES = ((1, 1), (2, 1), (2, 2))  # by what the largest tile's rows and columns are divided


@lru_cache(maxsize=65536)
def product_s(machine: Machine, m: int, n: int, k: int, precision: str, batch: int = 1) -> float:
    """Return the seconds of `batch` products [m, k] x [k, n], launch excluded.

    The result is cut into tiles; `units` of them run at a time (a wave), and the last wave is paid in full unless the
    library splits the inner dim to fill it. A tile starts at half speed: k + half_depth. The best of a few tile sizes
    counts, as a library's heuristic would choose; smaller tiles load more operands per operation.
    """
    spec = machine.matmul
    rate = machine.peak_flops(precision) * spec.efficiency * _alignment(n, k, spec.alignment) / spec.units
    best = math.inf
    for rows, columns in SMALLER_TILES:
        for tile_m, tile_n in ((spec.tile[0] // rows, spec.tile[1] // columns),
                               (spec.tile[1] // columns, spec.tile[0] // rows)):
            if tile_m < 1 or tile_n < 1:
                continue
            tiles = math.ceil(m / tile_m) * math.ceil(n / tile_n) * batch
            operands = 1 + 8 * (1 / tile_m + 1 / tile_n - 1 / spec.tile[0] - 1 / spec.tile[1])
            depth = 2 * tile_m * tile_n * (k + spec.half_depth) * operands
            best = min(best, math.ceil(tiles / spec.units) * depth / rate)
    element = {"fp64": 8, "fp32": 4}.get(precision, 2)
    moved = element * batch * (m * k + k * n + m * n)
    return max(best, moved / machine.chip.bytes_per_s)


def _alignment(n: int, k: int, unit: int) -> float:
    """Return the share of speed left when rows do not start on the machine's lines: 128 bytes, 64 16-bit elements.

    Source: NVIDIA, Matrix Multiplication Background User's Guide, figure on alignment (A100).
    """
    return ALIGNED[64 // unit * min(math.gcd(n, unit), math.gcd(k, unit))]


def moved_s(machine: Machine, num_bytes: float, kernels: int = 1, launch_s: float | None = None) -> float:
    """Return the seconds of `kernels` that only move memory."""
    launch = machine.chip.launch_us * 1e-6 if launch_s is None else launch_s
    return num_bytes / machine.chip.bytes_per_s + kernels * launch


FIRST_FLASH = 0.58  # speed of the first fused kernels beside the second ones at 128 channels, at any width


def fused_attention_s(machine: Machine, tokens: int, seq: int, heads: float, head_dim: int, precision: str,
                      backward: bool, version: int = 2) -> float:
    """Return the seconds of a fused causal attention over `tokens` in sequences of `seq`, launch excluded.

    Half of the score tiles are skipped; short sequences lose to the diagonal's tiles, narrow heads to the exponentials
    (which cost as much for 64 channels as for 128). Backward has 5 products where forward has 2.
    Source: Dao 2023, arXiv 2307.08691, figures 4-6.
    """
    share = machine.attention.backward if backward else machine.attention.forward
    products = 2.5 if backward else 1.0
    full = 4 * tokens * seq * heads * head_dim * products
    causal = 0.5 + 64 / seq if seq > 128 else 1.0
    width = min(1.0, head_dim / (0.7 * head_dim + 0.3 * 128)) if version == 2 else FIRST_FLASH
    return full * causal / (machine.peak_flops(precision) * share * width)
