"""Which stage goes first where ranks share cores.

A step ends with the last microbatch's way back, from the last stage to the first, and the last stage has the most to
compute: the logits too. With equal parts of the cores the others are done before it, and then one stage works at a
time while cores stand idle.

    equal parts            core 0  F0 F1 .. B6 | B7 of stage 7, 6, 5, 4, 3, 2, 1, 0
                           core 1  F0 F1 .. B6 |
    later stages first     core 0  .. B7 of 7 | B7 of 6 | 5 | 4 | 3 | 2 | 1 | 0
                           core 1  .. B5 of 6 | B6 of 5 | 4 | 3 | 2 | 1 | 0 |
"""

from __future__ import annotations

from collections.abc import Sequence

LEVELS = 7
"""Nice levels between the last stage and the first: Linux gives the last 1.25^7, nearly 5 times the first's part."""
PER_LEVEL = 1.25
"""How much more of a core a process gets than one a nice level above it (Linux, sched(7))."""


def nice_levels(chunk_ranks: Sequence[int]) -> list[int]:
    """Return by how many levels each stage lets others go first; 0 for all unless stage r is the r-th chunk alone.

    Loops and Vs bring every rank early and late chunks, so that none of them is later than another.
    """
    last = max(chunk_ranks)
    if last == 0 or list(chunk_ranks) != list(range(last + 1)):
        return [0] * (last + 1)
    return [round(LEVELS * (last - rank) / last) for rank in range(last + 1)]
