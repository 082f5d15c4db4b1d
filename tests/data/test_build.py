import fcntl
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcpar.data.build import build
from hpcpar.data.store import TokenStore
from hpcpar.errors import UserError

from .conftest import PRINT_PEAK, prose


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def start(texts: Path, out: Path, workers: int) -> subprocess.Popen[str]:
    program = f"""
from hpcpar.data.build import build
if __name__ == "__main__":
    build(["{texts}"], "{out}", vocab=400, workers={workers})
"""
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)


def test_the_number_of_workers_changes_no_byte(texts: Path, store: TokenStore, tmp_path: Path) -> None:
    build([texts], tmp_path / "two", vocab=400, workers=2, progress=False)
    assert contents(tmp_path / "two") == contents(store.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_goes_on_to_the_same_bytes(
    texts: Path, store: TokenStore, tmp_path: Path, workers: int
) -> None:
    out, work = tmp_path / "out", tmp_path / ".out.building"
    killed = start(texts, out, workers)
    deadline = time.monotonic() + 30
    while not list(work.glob("part-*.json")):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    time.sleep(0.5)  # workers end with their parent
    kept = {file: file.stat().st_mtime_ns for file in work.glob("part-*.json")}
    assert 0 < len(kept) < 3 and not out.exists()
    shutil.copytree(work, tmp_path / "seen", copy_function=os.link)  # keeps the inodes, to tell kept from made anew
    again = start(texts, out, workers)
    _, said = again.communicate(timeout=60)
    assert again.returncode == 0 and "going on with the build" in said
    assert contents(out) == contents(store.path)
    assert {file: (tmp_path / "seen" / file.name).stat().st_mtime_ns for file in kept} == kept
    assert not work.exists()


def test_a_torn_part_is_made_again(texts: Path, store: TokenStore, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / ".out.building"
    work.mkdir()
    (work / "journal.json").write_text(json.dumps({"inputs_sha256": store.info.inputs_sha256}))
    result = {"num_tokens": 5, "num_documents": 1, "num_files": 1, "num_binary": 0, "input_bytes": 1, "text_bytes": 1}
    (work / "part-00000.json").write_text(json.dumps(result))
    (work / "part-00000.bin").write_bytes(b"short")
    (work / "part-00001.json").write_text("{")
    build([texts], out, vocab=400, workers=1, progress=False)
    assert contents(out) == contents(store.path)


def test_a_finished_store_is_left_as_it_is(
    texts: Path, store: TokenStore, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (store.path / "tokens.bin").stat().st_mtime_ns
    build([texts], store.path, vocab=400)
    assert "is up to date" in capsys.readouterr().err
    assert (store.path / "tokens.bin").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"text: is a store built from other .*; remove it or pick another --out"):
        build([texts], store.path, vocab=401, progress=False)


def test_other_settings_start_anew(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / ".out.building"
    (work / "store").mkdir(parents=True)
    (work / "journal.json").write_text(json.dumps({"inputs_sha256": "other"}))
    build([texts / "0.txt"], tmp_path / "out", vocab=300, workers=1)
    assert "starting anew" in capsys.readouterr().err
    assert not work.exists()


def test_all_kinds_of_files(tmp_path: Path, store: TokenStore) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.md").write_text("# title")
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"squeezed"))
    (folder / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}'))
    (folder / "e.bin").write_bytes(b"\x7fELF\x00\x01")
    (folder / "f.rst").write_bytes(b"latin-1: \xe9")
    (folder / "g.py").write_text("")
    made = build([folder], folder / "out", tokenizer=store.path / "tokenizer.json", workers=1, progress=False)
    text = made.tokenizer().decode(made.window(0, made.num_tokens))
    expected = ["# title", "squeezed", "one", "two", "three", "latin-1: \ufffd"]
    assert text == "".join(f"{document}<|end|>" for document in expected)
    assert (made.info.num_documents, made.info.num_files) == (6, 5)  # documents and text files: two lines, none empty
    assert made.info.tokenizer_sha256 == store.info.tokenizer_sha256
    # OUT lies inside the inputs and is none of them: nothing has changed
    build([folder], folder / "out", tokenizer=store.path / "tokenizer.json", progress=False)


def test_limit_bytes(texts: Path, tmp_path: Path) -> None:
    made = build([texts], tmp_path / "out", vocab=300, workers=1, limit_bytes=100_000, progress=False)
    assert 100_000 <= made.info.text_bytes < 101_000
    assert made.info.num_documents == 1


def test_bad_wishes_are_named(texts: Path, tmp_path: Path, store: TokenStore) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"absent: does not exist; name files or folders of text"):
        build([tmp_path / "absent"], out, progress=False)
    with pytest.raises(UserError, match=r"--vocab: says how to train .*; drop one of the two"):
        build([texts], out, vocab=300, tokenizer=store.path / "tokenizer.json", progress=False)
    with pytest.raises(UserError, match=r"--vocab: 100 cannot hold .*; at least 257"):
        build([tmp_path], out, vocab=100, progress=False)  # before it looks for text
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "nothing.bin").write_bytes(b"\0")
    with pytest.raises(UserError, match=r"taken: no readable text there; name files or folders"):
        build([tmp_path / "taken"], out, vocab=300, progress=False)
    for other in (tmp_path / "taken", tmp_path / "taken" / "nothing.bin"):
        with pytest.raises(UserError, match=r"is there already \(is not a token store .*; remove it or pick another"):
            build([texts], other, vocab=300, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_an_error_in_a_worker_reaches_the_user(tmp_path: Path, store: TokenStore) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "x"}\n' * 200_000 + "oops\n")
    with pytest.raises(UserError, match=r"a.jsonl line 200001: is not JSON"):
        build([tmp_path / "in"], tmp_path / "out", tokenizer=store.path / "tokenizer.json", workers=2, progress=False)


def test_two_builds_do_not_share_a_workplace(texts: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.building").mkdir()
    with (tmp_path / ".out.building" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being built by another process"):
            build([texts], tmp_path / "out", vocab=300, progress=False)


def test_memory_does_not_grow_with_the_file(tmp_path: Path, store: TokenStore) -> None:
    """One .gz of 12 MB of text is one part: its worker's peak is that of a piece, not of the file."""
    (tmp_path / "big.txt.gz").write_bytes(gzip.compress(prose(12_000_000, seed=1).encode(), 1))
    program = f"""
from hpcpar.data.build import build
build(["{tmp_path}/big.txt.gz"], "{tmp_path}/out", tokenizer="{store.path}/tokenizer.json", workers=1, progress=False)
{PRINT_PEAK}
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 300
