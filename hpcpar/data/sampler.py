"""The order of training samples: a pure function of (seed, global sample index), with no table of samples.

A store is cut in windows of `seq` tokens, one after another; the sample of a window has seq + 1 tokens, so that its
last target is the first token of the next window. The last windows of each store are held out for validation.

    sample index -> block, slot -> store and count in that store -> epoch, place -> permutation(place) = window

Permutations are small Feistel networks, so that sample 10^9 costs what sample 0 costs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from hpcpar.data.store import TokenStore
from hpcpar.errors import UserError

BLOCK = 4096  # samples in which a blend meets its weights exactly
ROUNDS = 8
VALIDATION_KEY = 0x76616C  # apart from every seed: all runs validate on the same samples


class SampleOrder:
    """Which window of which store each sample index means. All index arguments are arrays of integers >= 0."""

    def __init__(
        self, stores: Sequence[TokenStore], weights: Sequence[float], seq: int, seed: int, validation: float = 0.0
    ):
        """Lay out the order. Raises: UserError if weights, stores or `validation` do not fit."""
        _check(stores, weights, validation)
        self.stores = list(stores)
        self.seq = seq
        self.counts = _block_counts(weights)
        windows = np.array([(store.num_tokens - 1) // seq for store in stores], dtype=np.int64)
        held = np.array([max(1, round(validation * int(n))) if validation else 0 for n in windows], dtype=np.int64)
        for store, num_train in zip(stores, windows - held, strict=True):
            if num_train < 1:
                rule = f"{store.num_tokens} tokens are too few for windows of {seq} (training and held out)"
                raise UserError(str(store.path), rule, "add text, or lower model.seq or data.validation")
        self.num_windows, self.num_held, self.num_train = windows, held, windows - held
        self.num_validation = int(held.sum())
        self._seed = np.uint64(seed % 2**64)
        named = [[store.fingerprint for store in stores], self.counts.tolist(), seq, seed, validation, BLOCK, ROUNDS]
        self.fingerprint = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the store and its window of each sample, int64 `[n]` both."""
        store, place = self._blend(indices, _key(self._seed, 0))
        size = self.num_train[store]
        epoch = place // size
        return store, permute(place % size, size, _key(self._seed, 1, store, epoch))

    def tokens(self, indices: np.ndarray) -> np.ndarray:
        """Return the samples as int64 `[n, seq+1]`: inputs are [:, :-1], targets [:, 1:]."""
        return self._read(*self.locate(indices))

    def locate_validation(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return store and window of each validation sample; indices wrap at `num_validation`."""
        if not self.num_validation:
            raise UserError("data.validation", "is 0, so that nothing is held out", "set it, e.g. to 0.01")
        fixed = np.uint64(VALIDATION_KEY)
        store, place = self._blend(np.asarray(indices) % self.num_validation, _key(fixed, 0))
        size = self.num_held[store]
        return store, self.num_train[store] + permute(place % size, size, _key(fixed, 1, store))

    def validation_tokens(self, indices: np.ndarray) -> np.ndarray:
        """Return held-out samples as int64 `[n, seq+1]`, in an order that no seed changes."""
        return self._read(*self.locate_validation(indices))

    def samples_hash(self, indices: np.ndarray) -> str:
        """Return 12 hex digits of the windows that the indices mean, in their order."""
        both = np.stack(self.locate(indices)).astype("<i8")
        return hashlib.sha256(both.tobytes()).hexdigest()[:12]

    def _read(self, stores: np.ndarray, windows: np.ndarray) -> np.ndarray:
        rows = np.empty((len(stores), self.seq + 1), dtype=np.int64)
        for row, store, window in zip(rows, stores.tolist(), windows.tolist(), strict=True):
            row[:] = self.stores[store].window(window * self.seq, self.seq + 1)
        return rows

    def _blend(self, indices: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each index's store and how many samples of that store come before it.

        Block b gives store k exactly counts[k] of its slots, dealt by a permutation keyed by b.
        """
        indices = np.asarray(indices, dtype=np.int64)
        assert indices.ndim == 1 and (indices >= 0).all(), "sample indices are a 1-d array of integers >= 0"
        if len(self.stores) == 1:
            return np.zeros_like(indices), indices
        block, slot = indices // BLOCK, indices % BLOCK
        store, place = np.empty_like(indices), np.empty_like(indices)
        ends = np.cumsum(self.counts)
        for b in np.unique(block):
            here = block == b
            dealt = permute(np.arange(BLOCK), np.full(BLOCK, BLOCK), _key(key, b))
            owner = np.searchsorted(ends, dealt, side="right")
            before = np.empty(BLOCK, dtype=np.int64)
            for k, count in enumerate(self.counts):
                before[owner == k] = np.arange(count)
            store[here] = owner[slot[here]]
            place[here] = b * self.counts[store[here]] + before[slot[here]]
        return store, place


def permute(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Map each place in [0, size) to another one: for a given size and key, a permutation of [0, size).

    A Feistel network on the a x b grid that just covers [0, size); a walk goes on while it is outside (at most about
    1/sqrt(size) of the grid is). All arguments and the result are integer `[n]` (sizes and keys may be scalars).
    Source: Black & Rogaway, Ciphers with Arbitrary Finite Domains (CT-RSA 2002), sections 4 and 5.
    """
    size, key = np.broadcast_arrays(np.asarray(sizes, np.uint64), np.asarray(keys, np.uint64))
    size, key = np.broadcast_to(size, places.shape), np.broadcast_to(key, places.shape)
    width = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    height = (size + width - np.uint64(1)) // width
    value = places.astype(np.uint64)
    todo = np.arange(len(value))
    while len(todo):
        a, b, k = width[todo], height[todo], key[todo]
        y, x = np.divmod(value[todo], a)
        for number in range(0, ROUNDS, 2):
            x = (x + _key(k, number, y) % a) % a
            y = (y + _key(k, number + 1, x) % b) % b
        value[todo] = y * a + x
        todo = todo[value[todo] >= size[todo]]
    return value.astype(np.int64)


def _key(*words: np.ndarray | np.uint64 | int) -> np.ndarray:
    """Hash words, each an integer or an array of them, to uint64 (broadcast), as splitmix64 does."""
    state = np.zeros(1, dtype=np.uint64)  # arrays wrap silently where scalars would warn
    for word in words:
        state = (state ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def _check(stores: Sequence[TokenStore], weights: Sequence[float], validation: float) -> None:
    if not stores or len(stores) != len(weights):
        rule = f"has {len(stores)} stores and {len(weights)} weights"
        raise UserError("data.store", rule, "give one store or more, a weight each")
    for store, weight in zip(stores, weights, strict=True):
        if not 0 < weight < float("inf"):
            raise UserError("data.store", f"{store.path} has weight {weight}", "weights are above 0: drop the store")
        if store.info.tokenizer_sha256 != stores[0].info.tokenizer_sha256:
            rule = f"{store.path} and {stores[0].path} have different tokenizers"
            raise UserError("data.store", rule, f"build both with --tokenizer {stores[0].path}/tokenizer.json")
    for path, count in zip((store.path for store in stores), _block_counts(weights), strict=True):
        if count == 0:
            rule = f"the weight of {path} is under 1/{BLOCK} of the total, so that no sample would come from it"
            raise UserError("data.store", rule, "raise it or drop the store")
    if not 0 <= validation < 1:
        raise UserError("data.validation", f"{validation} is no fraction", "at least 0, below 1")


def _block_counts(weights: Sequence[float]) -> np.ndarray:
    """Divide a block's slots by weight, largest remainder first; exact, so that every machine agrees."""
    exact = [Fraction(weight) for weight in weights]
    shares = [weight * BLOCK / sum(exact) for weight in exact]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: (counts[k] - shares[k], k))
    for k in by_remainder[: BLOCK - sum(counts)]:
        counts[k] += 1
    return np.array(counts, dtype=np.int64)
