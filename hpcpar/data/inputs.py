"""What a store is built from: find the text files, cut them in parts of even size, read a part piece by piece."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from hpcpar.errors import UserError
from hpcpar.units import format_bytes

PIECE = 1 << 20  # bytes read, and characters tokenized, at a time
LONGEST_LINE = 128 << 20  # of JSONL: bytes that are held in memory at once
SMALLEST_PART, LARGEST_PART, MANY_PARTS = 1 << 20, 256 << 20, 1024
CONTINUATION = bytes(range(0x80, 0xC0))  # bytes inside a UTF-8 character


@dataclass(frozen=True)
class InputFile:
    """A file as the journal knows it."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Segment:
    """Bytes start .. end-1 of a file (all of it if compressed); `last` if the document ends with it."""

    path: str
    start: int
    end: int
    last: bool

    @property
    def compressed(self) -> bool:
        """Whether it is read through gzip."""
        return self.path.endswith(".gz")

    @property
    def jsonl(self) -> bool:
        """Whether each line is a document."""
        return self.path.removesuffix(".gz").endswith(".jsonl")


Part = list[Segment]


def list_inputs(paths: Iterable[Path | str], skip: Path) -> list[InputFile]:
    """List the files under `paths` in sorted order, without hidden or empty ones, __pycache__ and the folder `skip`.

    Raises: UserError if a path does not exist.
    """
    found: dict[Path, InputFile] = {}
    for path in (Path(path).absolute() for path in paths):
        if not path.exists():
            raise UserError(str(path), "does not exist", "name files or folders of text")
        for name in _walk(path, skip) if path.is_dir() else [path]:
            if name.is_file() and (status := name.stat()).st_size:  # no dangling link, no pipe
                found.setdefault(name, InputFile(str(name), status.st_size, status.st_mtime_ns))
    return list(found.values())


def _walk(folder: Path, skip: Path) -> Iterator[Path]:
    def complain(error: OSError) -> None:
        raise UserError(str(error.filename), f"cannot be read ({error.strerror})", "leave it out") from error

    def wanted(path: Path) -> bool:
        hidden = path.name.startswith(".") or path.name == "__pycache__"
        return not hidden and not (path.name == skip.name and skip.exists() and path.samefile(skip))

    for at, folders, names in os.walk(folder, onerror=complain):
        folders[:] = sorted(name for name in folders if wanted(Path(at, name)))
        yield from (Path(at, name) for name in sorted(names) if not name.startswith("."))


def cut_inputs(files: list[InputFile], limit_bytes: int | None = None) -> list[Part]:
    """Cut the inputs in parts of about equal bytes: a pure function of the files, whatever the workers.

    `limit_bytes` ends the list there. Big plain files are cut at line ends; a .gz file is one segment.
    """
    total = sum(file.size for file in files)
    left = total if limit_bytes is None else min(total, limit_bytes)
    part_bytes = min(max(left // MANY_PARTS, SMALLEST_PART), LARGEST_PART)
    parts: list[Part] = [[]]
    filled = 0
    for file in files:
        if left <= 0:
            break
        for segment in _cut_file(file, part_bytes, left):
            if filled >= part_bytes:
                parts.append([])
                filled = 0
            parts[-1].append(segment)
            filled += segment.end - segment.start
        left -= file.size
    return parts


def _cut_file(file: InputFile, part_bytes: int, limit: int) -> Iterator[Segment]:
    end = min(file.size, limit)
    whole = Segment(file.path, 0, file.size, last=True)
    if whole.compressed or file.size <= min(part_bytes, limit):
        yield whole
        return
    start = 0
    with _open(file.path) as stream:
        while start < end:
            stop = _line_end(stream, min(start + part_bytes, end), file.size, whole.jsonl)
            yield Segment(file.path, start, stop, last=stop >= end)
            start = stop


def _line_end(stream: BinaryIO, near: int, size: int, jsonl: bool) -> int:
    """Return the offset after the line that holds byte `near`; text without line ends is cut between characters."""
    if near >= size:
        return size
    stream.seek(near)
    line = stream.readline(PIECE)
    while jsonl and line and not line.endswith(b"\n"):
        line = stream.readline(PIECE)
    at = stream.tell()
    if line.endswith(b"\n"):
        return at
    ahead = stream.read(3)
    return at + len(ahead) - len(ahead.lstrip(CONTINUATION))


def is_binary(segment: Segment) -> bool:
    """Say whether the file has a NUL byte in its first 8 KiB. Raises: UserError if it cannot be read."""
    with _reading(segment.path), _open(segment.path) as stream:
        return b"\0" in stream.read(8192)


def read_segment(segment: Segment) -> Iterator[str | None]:
    """Yield the text of a segment in pieces of at most about 1 Mi characters, and None where a document ends.

    Empty documents yield nothing. Memory is bounded whatever the size of the file.
    Raises: UserError if the file cannot be read, or a line of JSONL is not an object with a text.
    """
    with _reading(segment.path), _open(segment.path) as stream:
        if segment.start:
            stream.seek(segment.start)
        num_bytes = sys.maxsize if segment.compressed else segment.end - segment.start
        if segment.jsonl:
            for text in _json_texts(stream, num_bytes, segment):
                yield from _pieces([text])
                yield None
        else:
            filled = False
            for piece in _pieces(_decoded(stream, num_bytes)):
                filled = True
                yield piece
            if filled and segment.last:
                yield None


def _decoded(stream: BinaryIO, num_bytes: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while num_bytes > 0 and (block := stream.read(min(PIECE, num_bytes))):
        num_bytes -= len(block)
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def _json_texts(stream: BinaryIO, num_bytes: int, segment: Segment) -> Iterator[str]:
    at = 0
    while at < num_bytes and (line := stream.readline(LONGEST_LINE + 1)):
        text: object = None
        if len(line) > LONGEST_LINE:
            raise _bad_line(segment, at, f"is longer than {format_bytes(LONGEST_LINE)}")
        try:
            found = json.loads(line) if line.strip() else {"text": ""}
            text = found.get("text") if isinstance(found, dict) else None
        except (ValueError, RecursionError) as error:
            raise _bad_line(segment, at, f"is not JSON ({error})") from error
        if not isinstance(text, str):
            raise _bad_line(segment, at, 'has no "text" that is a string')
        at += len(line)
        if text:
            yield text.encode("utf-8", "replace").decode("utf-8")  # JSON can spell lone surrogates


def _bad_line(segment: Segment, at: int, rule: str) -> UserError:
    """Name the line that starts at byte `at` of the segment, as an editor counts it."""
    number, left = 1, segment.start + at
    with _open(segment.path) as stream:
        while left > 0 and (block := stream.read(min(PIECE, left))):
            number += block.count(b"\n")
            left -= len(block)
    return UserError(f"{segment.path} line {number}", rule, 'a line of JSONL is {"text": "..."}')


# A lone space between two words begins a token in every pre-tokenizer in use, so that a cut before it
# gives the same tokens as no cut.
_WORD_START = re.compile(r"(?<=\S)(?= \S)")
_TAIL = 1 << 16


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Regroup texts into pieces of at most PIECE characters, cut where a word starts if one does near the end."""
    kept = ""
    for text in texts:
        kept += text
        start = 0
        while len(kept) - start > PIECE:
            end = start + PIECE
            cuts = [match.start() for match in _WORD_START.finditer(kept, end - _TAIL, end)]
            cut = cuts[-1] if cuts else kept.rfind("\n", end - _TAIL, end) + 1 or end
            yield kept[start:cut]
            start = cut
        kept = kept[start:]
    if kept:
        yield kept


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn the errors of reading a file into a UserError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(path, f"cannot be read ({error})", "repair it or leave it out") from error


def _open(path: str) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if path.endswith(".gz") else Path(path).open("rb"))
