import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hpcpar.data.inputs import PIECE, Segment, cut_inputs, list_inputs, read_segment
from hpcpar.errors import UserError

from .conftest import PRINT_PEAK, prose


def documents(path: Path) -> list[str]:
    """Read a file through the same cuts as a build."""
    found, text = [], ""
    for segment in (segment for part in cut_inputs(list_inputs([path], skip=path / "no")) for segment in part):
        for piece in read_segment(segment):
            if piece is None:
                found.append(text)
                text = ""
            else:
                assert len(piece) <= PIECE
                text += piece
    return [*found, text] if text else found


@pytest.mark.parametrize("name", ["big.txt", "big.txt.gz"])
def test_a_big_file_comes_back_whole(tmp_path: Path, name: str) -> None:
    text = prose(5 * PIECE, seed=3)
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    assert documents(tmp_path / name) == [text]


@pytest.mark.parametrize("text", ["é" * (2 * PIECE), "\n" * (3 * PIECE), "x" + " " * (2 * PIECE) + "日" * 10])
def test_text_without_a_place_to_cut_comes_back_whole(tmp_path: Path, text: str) -> None:
    (tmp_path / "one.txt").write_text(text, encoding="utf-8", newline="")
    assert documents(tmp_path / "one.txt") == [text]


def test_cuts_change_no_token(tmp_path: Path) -> None:
    from hpcpar.data.tokenizer import train_tokenizer

    text = "def f(x):\n        return x  # nothing else\n\n" * 40_000
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(text.encode(), 1))  # one segment, two pieces
    words = train_tokenizer([text[:1000]], 300)
    (whole,) = words.encode_batch([text])
    segment = Segment(str(tmp_path / "t.txt.gz"), 0, 1, last=True)
    pieces = [piece for piece in read_segment(segment) if piece is not None]
    assert len(pieces) == 2
    assert [token for ids in words.encode_batch(pieces) for token in ids] == whole.tolist()


@pytest.mark.parametrize("name", ["many.jsonl", "many.jsonl.gz"])
def test_a_line_of_jsonl_is_a_document(tmp_path: Path, name: str) -> None:
    texts = [prose(3000, seed=i) for i in range(1000)] + ["last \ud83d"]
    lines = "\n\n".join(json.dumps({"text": text, "id": 1}) for text in ["", *texts]).encode()
    (tmp_path / name).write_bytes(gzip.compress(lines, 1) if name.endswith("gz") else lines)
    parts = cut_inputs(list_inputs([tmp_path], skip=tmp_path / "no"))
    assert len(parts) >= 1 + 2 * (not name.endswith("gz"))
    assert documents(tmp_path / name) == [*texts[:-1], "last ?"]


def test_folders_are_walked_in_order_without_hidden_ones(tmp_path: Path) -> None:
    for name in ["b/2.txt", "b/1.py", "a.md", ".hidden/x.txt", "b/.x.txt", "b/__pycache__/x.py", "out/y.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    found = list_inputs([tmp_path, tmp_path / "b"], skip=tmp_path / "out")
    assert [str(Path(file.path).relative_to(tmp_path)) for file in found] == ["a.md", "b/1.py", "b/2.txt"]


def test_limit_ends_the_inputs(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text("0123456\n" * 100)
    parts = cut_inputs(list_inputs([tmp_path], skip=tmp_path / "no"), limit_bytes=1000)
    assert [(Path(s.path).name, s.end, s.last) for part in parts for s in part] == [("a", 800, True), ("b", 208, True)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{oops\n', r"a.jsonl line 3: is not JSON"),
        ("b.jsonl", b'{"text": "x"}\n{"txt": "x"}\n', r'b.jsonl line 2: has no "text" that is a string; a line of'),
        ("c.jsonl.gz", gzip.compress(b'["x"]', mtime=0), r'c.jsonl.gz line 1: has no "text"'),
        ("d.txt.gz", b"plain", r"d.txt.gz: cannot be read \(Not a gzipped file.*; repair it or leave it out"),
        ("e.txt.gz", gzip.compress(b"x" * 5000, mtime=0)[:-9], r"e.txt.gz: cannot be read \(.*ended"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        documents(tmp_path / name)


def test_reading_a_big_file_takes_little_memory(tmp_path: Path) -> None:
    """200 MB as one line of text and as JSONL, uncut: the peak of a process of its own."""
    (tmp_path / "one.txt").write_bytes(b"word " * 40_000_000)
    (tmp_path / "many.jsonl").write_bytes((json.dumps({"text": "word " * 20_000}).encode() + b"\n") * 2000)
    program = f"""
from hpcpar.data.inputs import Segment, read_segment
for name in ("one.txt", "many.jsonl"):
    pieces = read_segment(Segment("{tmp_path}/" + name, 0, 2**40, last=True))
    print(sum(len(piece) for piece in pieces if piece))
{PRINT_PEAK}
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    text, jsonl, peak_mib = map(int, ran.stdout.split())
    assert text == jsonl == 200_000_000
    assert peak_mib < 100
