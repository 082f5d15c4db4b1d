"""The token store: a folder with raw token ids, what they are, and the tokenizer that made them.

STORE/tokens.bin      little-endian uint16 (uint32 above 65536 ids), documents one after another,
                      each ended by the end token: the boundaries need no table of their own
STORE/store.json      counts, dtype, end token, sha256 of tokens.bin and of tokenizer.json
STORE/tokenizer.json  the tokenizer
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from hpcpar.data.tokenizer import Tokenizer, load_tokenizer
from hpcpar.errors import UserError
from hpcpar.units import format_bytes, format_count

FORMAT = 1
BUILD = "build it with: hpcpar data build PATHS... --out STORE"


def token_dtype(vocab_size: int) -> str:
    """Return the numpy dtype that holds ids below `vocab_size`."""
    return "<u2" if vocab_size <= 65536 else "<u4"


@dataclass(frozen=True)
class StoreInfo:
    """What store.json says. `inputs_sha256` names the inputs and settings of the build."""

    format: int
    dtype: str
    num_tokens: int
    num_documents: int
    num_files: int
    text_bytes: int
    vocab_size: int
    end_token: int
    tokens_sha256: str
    tokenizer_sha256: str
    inputs_sha256: str

    def to_json(self) -> str:
        """Return the text of store.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> StoreInfo:
        """Read STORE/store.json. Raises: UserError if it is missing, not JSON, or of another format."""
        file = path / "store.json"
        if not file.is_file():
            raise UserError(str(path), "is not a token store (no store.json)", BUILD)
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(str(file), f"cannot be read ({error})", BUILD) from error
        version = found.get("format") if isinstance(found, dict) else None
        if version != FORMAT:
            raise UserError(str(file), f"is of format {version}, this hpcpar reads format {FORMAT}", BUILD)
        for field in fields(cls):
            kind = str if field.type == "str" else int
            if type(found.get(field.name)) is not kind:
                raise UserError(str(file), f"has no valid {field.name}", BUILD)
        info = cls(**{field.name: found[field.name] for field in fields(cls)})
        if info.dtype != token_dtype(info.vocab_size) or not 0 <= info.end_token < info.vocab_size:
            raise UserError(str(file), "contradicts itself (dtype, vocab_size, end_token)", BUILD)
        return info


@dataclass(frozen=True, eq=False)
class TokenStore:
    """A read-only token store; `tokens` is memory-mapped, so opening costs the same at any size."""

    path: Path
    info: StoreInfo
    tokens: np.ndarray

    @classmethod
    def open(cls, path: Path | str) -> TokenStore:
        """Open a store. Raises: UserError if it is missing, torn or of another format."""
        path = Path(path)
        info = StoreInfo.read(path)
        file = path / "tokens.bin"
        if not file.is_file():
            raise UserError(str(file), "is missing", BUILD)
        expected = info.num_tokens * np.dtype(info.dtype).itemsize
        if info.num_tokens < 1 or file.stat().st_size != expected:
            raise UserError(str(file), f"has {file.stat().st_size} bytes, store.json says {expected}", BUILD)
        return cls(path, info, np.memmap(file, dtype=info.dtype, mode="r"))

    @property
    def num_tokens(self) -> int:
        """Count of tokens, end tokens included."""
        return self.info.num_tokens

    @property
    def vocab_size(self) -> int:
        """One more than the highest id that the tokenizer can give."""
        return self.info.vocab_size

    @property
    def end_token(self) -> int:
        """The id that ends each document."""
        return self.info.end_token

    @property
    def fingerprint(self) -> str:
        """Short hex that changes with the tokens or the tokenizer."""
        both = self.info.tokenizer_sha256 + self.info.tokens_sha256
        return hashlib.sha256(both.encode()).hexdigest()[:16]

    def window(self, start: int, length: int) -> np.ndarray:
        """Return tokens start .. start+length-1 as int64 `[length]`."""
        assert start >= 0 and start + length <= self.num_tokens, (start, length, self.num_tokens)
        return self.tokens[start : start + length].astype(np.int64)

    def tokenizer(self) -> Tokenizer:
        """Load the store's tokenizer. Raises: UserError if tokenizer.json is missing or broken."""
        return load_tokenizer(self.path / "tokenizer.json")


def describe(path: Path | str) -> str:
    """Return what `hpcpar data show STORE` prints: counts, vocab, fingerprint, the first 200 characters."""
    store = TokenStore.open(path)
    info = store.info
    start = store.tokenizer().decode(store.window(0, min(400, info.num_tokens)))[:200]
    rows = {
        "store": str(store.path),
        "tokens": f"{info.num_tokens:,} ({format_count(info.num_tokens)}, {info.dtype.strip('<')},"
        f" {format_bytes(info.num_tokens * store.tokens.itemsize)})",
        "documents": f"{info.num_documents:,} from {info.num_files:,} files, {format_bytes(info.text_bytes)} of text",
        "bytes/token": f"{info.text_bytes / info.num_tokens:.2f}",
        "vocab": f"{info.vocab_size} (end token {info.end_token})",
        "fingerprint": store.fingerprint,
    }
    return "\n".join(f"{name:<12} {value}" for name, value in rows.items()) + f"\n\n{start}"
