"""Byte-level BPE: train one, load a given one, turn text into token ids and back."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpcpar.errors import UserError

if TYPE_CHECKING:
    import tokenizers

END = "<|end|>"
# Names under which well-known tokenizers keep their end-of-text token, tried in this order.
END_NAMES = (END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
SMALLEST_VOCAB = 257  # 256 bytes and the end token
# The trainer rescans a whole word at every merge: one line of base64 would cost minutes.
LONGEST_TRAINING_WORD = 1000


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and what the store records of it; `end_token` is the id that ends each document."""

    backend: tokenizers.Tokenizer
    end_token: int
    vocab_size: int

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts to int64 id arrays; no token is added, and a literal `<|end|>` in a text stays text.

        One thread: callers run one process a core, where a thread pool in each would fight the others.
        """
        return [np.array(self.backend.encode(text, add_special_tokens=False).ids, dtype=np.int64) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text; end tokens appear by name."""
        return self.backend.decode([int(token) for token in ids], skip_special_tokens=False)

    def to_json(self) -> bytes:
        """Return the bytes of its tokenizer.json."""
        return self.backend.to_str(pretty=True).encode("utf-8")

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of its tokenizer.json."""
        return hashlib.sha256(self.to_json()).hexdigest()


def check_vocab(vocab: int) -> None:
    """Raise UserError unless a byte-level tokenizer can be that small."""
    if vocab < SMALLEST_VOCAB:
        raise UserError("--vocab", f"{vocab} cannot hold the 256 bytes and the end token", f"at least {SMALLEST_VOCAB}")


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Train a byte-level BPE with up to `vocab` tokens; the end token has the last id.

    Fewer tokens come out when the text has too few different pairs. Raises: UserError if vocab < 257.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    check_vocab(vocab)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    long_word = re.compile(rf"((?<!\S)\S{{{LONGEST_TRAINING_WORD}}})\S+")
    backend.train_from_iterator((long_word.sub(r"\1", text) for text in texts), trainer)
    return _wrap(backend)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer.json; one without a known end token gets `<|end|>` as its last id.

    Raises: UserError if the file cannot be read or is no tokenizer.
    """
    from tokenizers import Tokenizer as Backend

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read ({error})", "name a tokenizer.json") from error
    try:
        backend = Backend.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise UserError(str(path), f"is not a tokenizer ({error})", "name a Hugging Face tokenizer.json") from error
    return _wrap(backend)


def _wrap(backend: tokenizers.Tokenizer) -> Tokenizer:
    """Settle the end token and switch off whatever would add or lose tokens."""
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # a document that spells "<|end|>" must not end there
    name = next((name for name in END_NAMES if backend.token_to_id(name) is not None), None)
    if name is None:
        name = END
        backend.add_special_tokens([END])
    vocab = backend.get_vocab(with_added_tokens=True)
    return Tokenizer(backend, end_token=vocab[name], vocab_size=max(vocab.values()) + 1)  # ids may have holes
