"""Build a token store: cut the inputs in parts, tokenize the parts in worker processes, join them in order.

    paths -> inputs.list_inputs -> inputs.cut_inputs -> part 0, part 1, ...        same parts for any number of workers
                 a bounded sample of every part -> tokenizer.json                  (or the given one)
                 part i -> worker -> part-0000i.bin, then part-0000i.json          a part with its .json is finished
                 all parts, in order -> tokens.bin, store.json -> rename to OUT

All of it happens in `.OUT.building` beside OUT. A build that was killed goes on there; `journal.json` says what it
was building, and other inputs or settings start anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hpcpar.data.inputs import InputFile, Part, cut_inputs, is_binary, list_inputs, read_segment
from hpcpar.data.progress import Progress
from hpcpar.data.store import FORMAT, StoreInfo, TokenStore, token_dtype
from hpcpar.data.tokenizer import Tokenizer, check_vocab, load_tokenizer, train_tokenizer
from hpcpar.errors import RunError, UserError

DEFAULT_VOCAB = 32768
SAMPLE_CHARACTERS = 64 << 20  # the tokenizer trains on this much, spread evenly over the parts
COPY_BYTES = 8 << 20


@dataclass(frozen=True)
class PartResult:
    """What a finished part holds; `input_bytes` as on disk, `text_bytes` as UTF-8."""

    num_tokens: int
    num_documents: int
    num_files: int
    num_binary: int
    input_bytes: int
    text_bytes: int


def build(
    paths: Sequence[Path | str],
    out: Path | str,
    vocab: int | None = None,
    tokenizer: Path | str | None = None,
    workers: int | None = None,
    limit_bytes: int | None = None,
    progress: bool = True,
) -> TokenStore:
    """Build the token store `out` from text files and folders, or go on with a build that was killed.

    The tokens depend on the inputs, the tokenizer and `limit_bytes`, never on `workers` (default: the cores that this
    process may use). With two or more workers the caller's script needs its `if __name__ == "__main__"`.
    Raises: UserError for inputs that cannot be used or an `out` that is something else; RunError if a worker dies.
    Cost: about 4 MB of text a second and 200 MB of memory a worker; twice the disk of the store while it joins.
    """
    out = Path(out).absolute()
    report = Progress(progress)
    if vocab is not None and tokenizer is not None:
        raise UserError("--vocab", "says how to train a tokenizer, and --tokenizer gives one", "drop one of the two")
    size = DEFAULT_VOCAB if vocab is None else vocab
    check_vocab(size)  # before hours of reading
    given = load_tokenizer(tokenizer) if tokenizer is not None else None
    files = list_inputs(paths, skip=out)
    key = _inputs_key(files, given.fingerprint if given else f"train {size}", limit_bytes)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        return _up_to_date(out, key, report)
    with _workplace(out, key, report) as work:
        parts = cut_inputs(files, limit_bytes)
        words = _settle_tokenizer(work, given, size, parts, report)
        results = _encode_parts(work, parts, words, workers or len(os.sched_getaffinity(0)), report)
        readable = any(result.num_tokens for result in results)
        if readable:
            _publish(work, out, results, words, key)
    shutil.rmtree(work, ignore_errors=True)  # after the lock is closed: NFS keeps open files
    if not readable:
        raise UserError(", ".join(map(str, paths)), "no readable text there", "name files or folders of text")
    store = TokenStore.open(out)
    num_binary = sum(result.num_binary for result in results)
    skipped = f" ({num_binary} binary files skipped)" if num_binary else ""
    report.say(f"built {out}: {store.num_tokens:,} tokens, {store.info.num_documents:,} documents{skipped}")
    return store


def _inputs_key(files: list[InputFile], words: str, limit_bytes: int | None) -> str:
    """Hash all that decides the tokens, so that a build goes on only with its own parts."""
    digest = hashlib.sha256(json.dumps([FORMAT, words, limit_bytes]).encode())
    for file in files:
        digest.update(json.dumps([file.path, file.size, file.mtime_ns]).encode())
    return digest.hexdigest()


def _up_to_date(out: Path, key: str, report: Progress) -> TokenStore:
    try:
        store = TokenStore.open(out)
    except UserError as error:
        raise UserError(str(out), f"is there already ({error.rule})", "remove it or pick another --out") from error
    if store.info.inputs_sha256 != key:
        raise UserError(str(out), "is a store built from other inputs or settings", "remove it or pick another --out")
    report.say(f"{out} is up to date: {store.num_tokens:,} tokens")
    return store


@contextmanager
def _workplace(out: Path, key: str, report: Progress) -> Iterator[Path]:
    """Lock `.OUT.building` and empty it unless its journal names this very build."""
    work = out.parent / f".{out.name}.building"
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise UserError(str(out), f"cannot be written ({error})", "pick another --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(str(out), "is being built by another process", "wait for it or stop it") from None
        except OSError:
            pass  # a file system without locks: two builds at once would waste work, but write the same bytes
        try:
            _begin_or_go_on(work, key, report)
            yield work
        except OSError as error:
            raise RunError(f"{work}: {error}; the same command goes on where it was") from error


def _begin_or_go_on(work: Path, key: str, report: Progress) -> None:
    journal = work / "journal.json"
    previous = journal.read_text() if journal.exists() else ""
    if previous == json.dumps({"inputs_sha256": key}):
        report.say(f"going on with the build in {work}")
        return
    if previous:
        report.say(f"{work} was for other inputs or settings: starting anew")
    for entry in work.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()
    _write(journal, json.dumps({"inputs_sha256": key}).encode())


def _settle_tokenizer(
    work: Path, given: Tokenizer | None, vocab: int, parts: list[Part], report: Progress
) -> Tokenizer:
    """Return the given tokenizer, the one that a killed build had trained, or a new one; kept in the workplace."""
    file = work / "tokenizer.json"
    if file.exists():
        return load_tokenizer(file)
    if given is None:
        report.say(f"training a tokenizer of {vocab} tokens")
        given = train_tokenizer(_sample(parts), vocab)
        if given.vocab_size < vocab:
            report.say(f"the text has pairs for {given.vocab_size} tokens only")
    _write(file, given.to_json())
    return given


def _sample(parts: list[Part]) -> Iterator[str]:
    """Yield the first texts of every part, the same budget each."""
    for part in parts:
        left = SAMPLE_CHARACTERS // len(parts)
        for piece in (piece for segment in part if not is_binary(segment) for piece in read_segment(segment)):
            if piece is not None:
                yield piece[:left]
                left -= len(piece)
            if left <= 0:
                break


def _encode_parts(work: Path, parts: list[Part], words: Tokenizer, workers: int, report: Progress) -> list[PartResult]:
    """Tokenize the parts that are not finished, in any order; return the results in the order of the parts."""
    dtype = token_dtype(words.vocab_size)
    results = {i: result for i in range(len(parts)) if (result := _finished(work, i, dtype)) is not None}
    todo = [i for i in range(len(parts)) if i not in results]
    total_bytes = sum(segment.end - segment.start for part in parts for segment in part)
    with report.bar(total_bytes, list(results.values())) as advance:
        for i, result in _encode_missing(work, parts, todo, min(workers, len(todo))):
            results[i] = result
            advance(result)
    return [results[i] for i in range(len(parts))]


def _encode_missing(work: Path, parts: list[Part], todo: list[int], workers: int) -> Iterator[tuple[int, PartResult]]:
    if workers <= 1:
        for i in todo:
            yield i, _encode_part(work, i, parts[i])
        return
    # Spawned: the parent has threads by now (progress, the tokenizer's trainer), and a fork would copy their locks.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_parent)
    try:
        futures = {pool.submit(_encode_in_worker, work, i, parts[i]): i for i in todo}
        for future in as_completed(futures):
            result = future.result()
            if isinstance(result, tuple):
                raise UserError(*result)
            yield futures[future], result
    except BrokenProcessPool as error:
        rule = "a worker process was killed (out of memory?)"
        raise RunError(f"{work}: {rule}; the same command goes on where it was") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Die at once with the parent or at Ctrl-C: a worker that outlives a killed build would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _encode_in_worker(work: Path, i: int, part: Part) -> PartResult | tuple[str, str, str]:
    """Encode part i; a UserError comes back as its three strings, since it does not survive pickling."""
    try:
        return _encode_part(work, i, part)
    except UserError as error:
        return error.where, error.rule, error.fix


def _encode_part(work: Path, i: int, part: Part) -> PartResult:
    """Write part-i.bin, then part-i.json, each by rename: the second one marks the part as finished."""
    words = load_tokenizer(work / "tokenizer.json")
    dtype = token_dtype(words.vocab_size)
    num_tokens = num_documents = num_binary = text_bytes = 0
    draft = work / f"part-{i:05d}.draft"
    with draft.open("wb") as file:
        for segment in part:
            if is_binary(segment):
                num_binary += segment.last
                continue
            for piece in read_segment(segment):
                ids = [words.end_token] if piece is None else words.encode_batch([piece])[0]
                num_documents += piece is None
                text_bytes += len(piece.encode("utf-8")) if piece is not None else 0
                num_tokens += len(ids)
                file.write(np.asarray(ids, dtype=dtype).tobytes())
    draft.replace(_part_file(work, i))
    result = PartResult(
        num_tokens=num_tokens,
        num_documents=num_documents,
        num_files=sum(segment.last for segment in part) - num_binary,
        num_binary=num_binary,
        input_bytes=sum(segment.end - segment.start for segment in part),
        text_bytes=text_bytes,
    )
    _write(_part_file(work, i).with_suffix(".json"), json.dumps(asdict(result)).encode())
    return result


def _part_file(work: Path, i: int) -> Path:
    return work / f"part-{i:05d}.bin"


def _finished(work: Path, i: int, dtype: str) -> PartResult | None:
    """Return what part i holds if a build before this one finished it."""
    file = _part_file(work, i)
    try:
        result = PartResult(**json.loads(file.with_suffix(".json").read_bytes()))
        whole = file.stat().st_size == result.num_tokens * np.dtype(dtype).itemsize
    except (OSError, ValueError, TypeError):
        return None
    return result if whole else None


def _publish(work: Path, out: Path, results: list[PartResult], words: Tokenizer, key: str) -> None:
    """Join the parts, write store.json, and rename the folder to OUT: a store is there whole or not at all."""
    draft = work / "store"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    digest = _join((_part_file(work, i) for i in range(len(results))), draft / "tokens.bin")
    info = StoreInfo(
        format=FORMAT,
        dtype=token_dtype(words.vocab_size),
        num_tokens=sum(result.num_tokens for result in results),
        num_documents=sum(result.num_documents for result in results),
        num_files=sum(result.num_files for result in results),
        text_bytes=sum(result.text_bytes for result in results),
        vocab_size=words.vocab_size,
        end_token=words.end_token,
        tokens_sha256=digest,
        tokenizer_sha256=words.fingerprint,
        inputs_sha256=key,
    )
    _write(draft / "tokenizer.json", words.to_json())
    _write(draft / "store.json", info.to_json().encode())
    draft.replace(out)


def _join(parts: Iterable[Path], target: Path) -> str:
    """Copy the parts one after another; return the sha256 of the whole."""
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for part in parts:
            with part.open("rb") as stream:
                while block := stream.read(COPY_BYTES):
                    digest.update(block)
                    file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all."""
    draft = path.with_name(path.name + ".draft")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
