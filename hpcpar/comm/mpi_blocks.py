"""Memory of a group that is lent to its ranks and comes back by itself: part of `mpi_shared`.

    lend   a block that every rank had free when it arrived at the last turn, and that was not lent since: the ranks
           find the same one without a word, and nobody reads any more what lay there
    back   when no tensor lies in it any more; a rank's next arrival says which blocks it has free
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from .mpi_lanes import Lanes

_MOST = 63  # blocks: the bits of a word, without its sign


class Blocks:
    """A group's blocks, numbered alike on all ranks, which all borrow in one order with no turn under way."""

    def __init__(self, make: Callable[[int, bool], Tensor | None]):
        """`make(num_bytes, common)`: new memory for the group, called by all ranks, or None for all."""
        self._make, self._may_grow = make, True
        self._blocks: list[tuple[Tensor, bool]] = []  # bytes; whether they are the same for all ranks
        self._lent: list[Callable[[], object]] = []  # of each block, what it was lent as here while that lives
        self._lent_since = (0, 0)  # a turn's number, and the blocks lent after it

    def free(self) -> int:
        """Return the numbers of what is not lent here, as bits: the word for the lanes."""
        return sum(1 << number for number, lent in enumerate(self._lent) if lent() is None)

    def lend(self, num_bytes: int, common: bool, lanes: Lanes) -> Tensor | None:
        """Return bytes of old or new memory, with whatever lies there; None for all ranks where there are none."""
        turn, lent = self._lent_since
        lent = lent if turn == lanes.num_taken else 0
        free = lanes.agreed & ~lent
        fits = (number for number, (memory, for_all) in enumerate(self._blocks)
                if free >> number & 1 and for_all == common and num_bytes <= memory.numel() <= 2 * num_bytes)
        number = next(fits, None)
        if number is None:
            number = self._grow(num_bytes, common)
        if number is None:
            return None
        self._lent_since = lanes.num_taken, lent | 1 << number
        memory = self._blocks[number][0].numpy()[:num_bytes]  # an object of its own, which the tensor keeps
        self._lent[number] = weakref.ref(memory)
        return torch.from_numpy(memory)

    def _grow(self, num_bytes: int, common: bool) -> int | None:
        if not self._may_grow:
            return None
        memory = self._make(num_bytes, common)
        if memory is None:
            self._may_grow = False
            return None
        self._blocks.append((memory, common))
        self._lent.append(lambda: None)  # to nobody yet
        self._may_grow = len(self._blocks) < _MOST
        return len(self._blocks) - 1
