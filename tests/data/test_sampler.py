import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from hpcpar.data.sampler import BLOCK, SampleOrder, permute
from hpcpar.data.store import FORMAT, StoreInfo, TokenStore
from hpcpar.errors import UserError

SEQ = 8


def counting_store(num_tokens: int, name: str = "a", tokenizer: str = "t") -> TokenStore:
    """A store in memory whose token i is i."""
    sha = hashlib.sha256(name.encode()).hexdigest()
    info = StoreInfo(FORMAT, "<u4", num_tokens, 1, 1, num_tokens, 2**31, 0, sha, tokenizer, "")
    return TokenStore(Path(name), info, np.arange(num_tokens, dtype="<u4"))


def order(*windows: int, weights: list[float] | None = None, **options: float) -> SampleOrder:
    stores = [counting_store(n * SEQ + 1, name=f"s{k}") for k, n in enumerate(windows)]
    chosen = {"seed": 1} | options
    return SampleOrder(stores, weights or [1.0] * len(stores), seq=SEQ, **chosen)  # type: ignore[arg-type]


def test_permute_is_a_permutation_for_every_size() -> None:
    sizes = np.repeat(np.arange(1, 2001), np.arange(1, 2001))
    places = np.concatenate([np.arange(n) for n in range(1, 2001)])
    found = permute(places, sizes, sizes * 31)
    assert (np.sort(found + sizes * 10_000) == places + sizes * 10_000).all()


def test_permute_mixes() -> None:
    """Each of 20 places goes to each of 20 values about equally often over 4000 keys."""
    keys = np.repeat(np.arange(4000), 20)
    places = np.tile(np.arange(20), 4000)
    found = permute(places, np.full(80_000, 20), keys)
    table = np.zeros((20, 20))
    np.add.at(table, (places, found), 1)
    assert abs(table - 200).max() < 5 * np.sqrt(200)
    large = permute(np.arange(100_000), np.full(100_000, 100_000), np.zeros(1))
    assert abs(np.corrcoef(np.arange(100_000), large)[0, 1]) < 0.02
    assert (np.diff(large) == 1).sum() < 20


@pytest.mark.parametrize("windows", [1, 2, 3, 7, 64, 1000])
def test_each_epoch_visits_every_window_once(windows: int) -> None:
    one = order(windows)
    epochs = one.locate(np.arange(3 * windows))[1].reshape(3, windows)
    assert (np.sort(epochs, axis=1) == np.arange(windows)).all()
    if windows > 10:
        assert (epochs[0] != epochs[1]).any()
        assert (epochs[0] != order(windows, seed=2).locate(np.arange(windows))[1]).any()


def test_a_sample_is_a_window_and_its_next_token() -> None:
    one = order(50)
    found = one.tokens(np.arange(50))
    assert found.shape == (50, SEQ + 1) and found.dtype == np.int64
    assert (found == one.locate(np.arange(50))[1][:, None] * SEQ + np.arange(SEQ + 1)).all()


def test_the_order_is_pure() -> None:
    blend = order(300, 40, 1000, weights=[0.5, 0.2, 0.3])
    indices = np.random.default_rng(0).integers(0, 10**6, 500)
    store, window = blend.locate(indices)
    again = order(300, 40, 1000, weights=[5, 2, 3])
    for i in range(0, 500, 50):
        assert (store[i], window[i]) == tuple(int(x[0]) for x in again.locate(indices[i : i + 1]))
    assert blend.fingerprint == again.fingerprint
    assert blend.samples_hash(indices) == again.samples_hash(indices)
    assert blend.samples_hash(indices) != blend.samples_hash(indices[::-1])


def test_the_order_is_the_same_on_every_machine() -> None:
    """A changed number here means that no run could be resumed on its own data: raise the fingerprint's version."""
    assert order(1000).locate(np.arange(5))[1].tolist() == PINNED_ONE
    assert order(300, 40, weights=[0.7, 0.3]).samples_hash(np.arange(10_000)) == PINNED_BLEND


PINNED_ONE = [977, 724, 320, 233, 487]
PINNED_BLEND = "4d09e9fe648c"


def test_a_blend_meets_its_weights_in_every_block() -> None:
    weights = [0.61, 0.3, 0.09]
    blend = order(300, 40, 1000, weights=weights)
    store, _ = blend.locate(np.arange(5 * BLOCK))
    counts = np.stack([np.bincount(block, minlength=3) for block in store.reshape(5, BLOCK)])
    assert (counts == blend.counts).all()
    assert blend.counts.sum() == BLOCK
    assert (abs(blend.counts - np.array(weights) * BLOCK) < 1).all()
    assert (store[:BLOCK] != store[BLOCK : 2 * BLOCK]).any()


def test_a_store_of_a_blend_visits_its_windows_epoch_by_epoch() -> None:
    blend = order(300, 1000, weights=[0.4, 0.6])
    store, window = blend.locate(np.arange(3 * BLOCK))
    for k, windows in enumerate([300, 1000]):
        seen = window[store == k]
        epochs = seen[: len(seen) // windows * windows].reshape(-1, windows)
        assert (np.sort(epochs, axis=1) == np.arange(windows)).all()


def test_a_far_index_needs_no_table() -> None:
    store = counting_store(1001)
    blend = SampleOrder([store, counting_store(10_001, "b")], [1, 3], seq=SEQ, seed=1)
    big = SampleOrder([store], [1], seq=SEQ, seed=1)
    big.num_train[0] = 10**12  # as if the store had that many windows
    for far in (blend, big):
        tracemalloc.start()
        far.locate(np.array([10**9, 10**9 + 1, 10**15]))
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 2 << 20


def test_a_far_index_takes_as_many_operations_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements that are permuted: a block's slots, and the samples themselves; whatever the index."""
    asked: list[int] = []

    def counted(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
        asked.append(len(places))
        return permute(places, sizes, keys)

    monkeypatch.setattr("hpcpar.data.sampler.permute", counted)
    blend = order(100, 1000, weights=[0.3, 0.7])
    blend.num_train[:] = [300_000_000, 700_000_000]  # as if the stores had that many windows: a billion samples
    for first in (0, 10**9 // BLOCK * BLOCK):
        asked.clear()
        blend.locate(np.arange(first, first + 8))
        assert asked == [BLOCK, 8]


def test_validation_is_apart_from_training() -> None:
    split = order(100, 40, weights=[0.5, 0.5], validation=0.1)
    assert split.num_validation == 10 + 4
    trained = set(zip(*(x.tolist() for x in split.locate(np.arange(3 * BLOCK))), strict=True))
    held = set(zip(*(x.tolist() for x in split.locate_validation(np.arange(split.num_validation))), strict=True))
    assert len(trained) == 90 + 36
    assert not trained & held
    assert {window >= [90, 36][store] for store, window in held} == {True}


def test_validation_is_fixed_and_wraps() -> None:
    split, other = order(100, validation=0.2), order(100, validation=0.2, seed=5)
    found = split.validation_tokens(np.arange(20))
    assert found.shape == (20, SEQ + 1)
    assert sorted(found[:, 0] // SEQ) == list(range(80, 100))
    assert (found == other.validation_tokens(np.arange(20, 40))).all()


def test_the_fingerprint_notices_every_choice() -> None:
    base = {"weights": [1.0, 1.0], "seq": SEQ, "seed": 1, "validation": 0.0}
    stores = [counting_store(1000), counting_store(1000, "b")]
    changes: list[dict[str, object]] = [{}, {"weights": [1, 2]}, {"seq": 9}, {"seed": 2}, {"validation": 0.1}]
    prints = {SampleOrder(stores, **(base | change)).fingerprint for change in changes}  # type: ignore[arg-type]
    prints.add(SampleOrder(stores[::-1], **base).fingerprint)  # type: ignore[arg-type]
    assert len(prints) == 6


@pytest.mark.parametrize(
    ("stores", "weights", "validation", "message"),
    [
        ([8], [1], 0.0, r"s0: 8 tokens are too few for windows of 8 .*; add text, or lower model.seq"),
        ([9], [1], 0.1, r"s0: 9 tokens are too few"),
        ([99, 99], [1, 0], 0.0, r"data.store: s1 has weight 0; weights are above 0"),
        ([99], [float("nan")], 0.0, r"data.store: s0 has weight nan"),
        ([99, 99], [1, 1e-6], 0.0, r"data.store: the weight of s1 is under 1/4096 of the total"),
        ([99], [1, 2], 0.0, r"data.store: has 1 stores and 2 weights"),
        ([], [], 0.0, r"data.store: has 0 stores"),
        ([99], [1], 1.0, r"data.validation: 1.0 is no fraction; at least 0, below 1"),
    ],
)
def test_bad_wishes_are_named(stores: list[int], weights: list[float], validation: float, message: str) -> None:
    opened = [counting_store(n, f"s{k}") for k, n in enumerate(stores)]
    with pytest.raises(UserError, match=message):
        SampleOrder(opened, weights, SEQ, 1, validation)


def test_stores_of_different_tokenizers_do_not_blend() -> None:
    stores = [counting_store(99, "a"), counting_store(99, "b", tokenizer="other")]
    with pytest.raises(UserError, match=r"b and a have different tokenizers; build both with --tokenizer a/tokenizer"):
        SampleOrder(stores, [1, 1], SEQ, 1)
    with pytest.raises(UserError, match=r"data.validation: is 0"):
        order(9).validation_tokens(np.arange(1))
