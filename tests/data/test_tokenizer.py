from pathlib import Path

import pytest

from hpcpar.data.tokenizer import load_tokenizer, train_tokenizer
from hpcpar.errors import UserError

SAMPLE = ["the layout is a value, and everything reads the same one. " * 20]


TEXTS = ["plain", "  indented\n\n\ttabs ", "naïve 日本語 🙂", "<|end|>", "\x00\x7f", "a" * 5000]


@pytest.mark.parametrize("text", TEXTS)
def test_decode_undoes_encode(text: str) -> None:
    words = train_tokenizer(SAMPLE, 300)
    (ids,) = words.encode_batch([text])
    assert words.decode(ids) == text
    assert words.end_token not in ids


def test_the_end_token_is_the_last_id() -> None:
    words = train_tokenizer(SAMPLE, 280)
    assert words.vocab_size == 280
    assert words.end_token == 279
    assert words.decode([279]) == "<|end|>"


def test_training_is_repeatable_and_survives_the_file(tmp_path: Path) -> None:
    first, second = train_tokenizer(SAMPLE, 300), train_tokenizer(SAMPLE, 300)
    assert first.to_json() == second.to_json()
    (tmp_path / "tokenizer.json").write_bytes(first.to_json())
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == first.fingerprint
    assert (loaded.end_token, loaded.vocab_size) == (first.end_token, first.vocab_size)


def test_a_loaded_tokenizer_gets_an_end_token_and_loses_truncation(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    bare = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    bare.enable_truncation(1)
    bare.save(str(tmp_path / "t.json"))
    words = load_tokenizer(tmp_path / "t.json")
    assert words.vocab_size > words.end_token >= 2
    assert words.vocab_size >= 8
    assert words.backend.truncation is None


def test_one_endless_word_does_not_stall_the_trainer() -> None:
    assert train_tokenizer(["ab" * 500_000], 300).vocab_size < 300


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--vocab: 100 cannot hold .*; at least 257"):
        train_tokenizer(SAMPLE, 100)
    with pytest.raises(UserError, match=r"absent.json: cannot be read"):
        load_tokenizer(tmp_path / "absent.json")
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(UserError, match=r"no.json: is not a tokenizer .*; name a Hugging Face tokenizer.json"):
        load_tokenizer(tmp_path / "no.json")
