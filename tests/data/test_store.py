import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hpcpar.data.store import TokenStore, describe, token_dtype
from hpcpar.errors import UserError


@pytest.fixture
def copy(store: TokenStore, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store.path, tmp_path / "copy"))


def test_the_store_holds_the_texts(store: TokenStore, texts: Path) -> None:
    tokens = store.window(0, store.num_tokens)
    assert tokens.dtype == np.int64
    ends = np.flatnonzero(tokens == store.end_token)
    assert len(ends) == store.info.num_documents == store.info.num_files == 6
    assert ends[-1] == store.num_tokens - 1
    starts = [0, *(ends[:-1] + 1)]
    found = [store.tokenizer().decode(tokens[a:b]) for a, b in zip(starts, ends, strict=True)]
    assert found == [(texts / name).read_text() for name in ["0.txt", "2.txt", "4.txt"]] + [
        (texts / "deep" / name).read_text() for name in ["1.txt", "3.txt", "5.txt"]
    ]
    assert store.info.text_bytes == sum(file.stat().st_size for file in texts.rglob("*.txt"))


def test_window_reads_a_run(store: TokenStore) -> None:
    raw = np.fromfile(store.path / "tokens.bin", dtype="<u2")
    assert store.window(1000, 5).tolist() == raw[1000:1005].tolist()
    with pytest.raises(AssertionError):
        store.window(store.num_tokens - 2, 3)
    assert token_dtype(65536) == "<u2"
    assert token_dtype(65537) == "<u4"


def test_describe_says_what_it_is(store: TokenStore, texts: Path) -> None:
    said = describe(store.path)
    assert f"{store.num_tokens:,}" in said
    assert store.fingerprint in said
    assert "vocab        400 (end token 399)" in said
    assert (texts / "0.txt").read_text()[:200] in said


def test_the_fingerprint_follows_tokens_and_tokenizer(copy: Path) -> None:
    prints = {TokenStore.open(copy).fingerprint}
    for field in ("tokens_sha256", "tokenizer_sha256"):
        change(copy, **{field: "0"})
        prints.add(TokenStore.open(copy).fingerprint)
    assert len(prints) == 3


def change(path: Path, **values: object) -> None:
    file = path / "store.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_broken_store_is_named(copy: Path, tmp_path: Path) -> None:
    fix = "build it with: hpcpar data build PATHS... --out STORE"
    with pytest.raises(UserError, match=rf"absent: is not a token store \(no store.json\); {fix}"):
        TokenStore.open(tmp_path / "absent")
    with (copy / "tokens.bin").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match=rf"tokens.bin: has 1000 bytes, store.json says \d+; {fix}"):
        TokenStore.open(copy)
    (copy / "tokens.bin").unlink()
    with pytest.raises(UserError, match=rf"tokens.bin: is missing; {fix}"):
        TokenStore.open(copy)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 2}, r"store.json: is of format 2, this hpcpar reads format 1"),
        ({"num_tokens": "many"}, r"store.json: has no valid num_tokens"),
        ({"dtype": "<u4"}, r"store.json: contradicts itself"),
        ({"end_token": 400}, r"store.json: contradicts itself"),
    ],
)
def test_a_wrong_store_json_is_named(copy: Path, values: dict[str, object], message: str) -> None:
    change(copy, **values)
    with pytest.raises(UserError, match=message):
        TokenStore.open(copy)


def test_store_json_that_is_no_json(copy: Path) -> None:
    for content, message in [("{", "cannot be read"), ("[]", "is of format None")]:
        (copy / "store.json").write_text(content)
        with pytest.raises(UserError, match=message):
            TokenStore.open(copy)
    (copy / "store.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read"):
        TokenStore.open(copy)
