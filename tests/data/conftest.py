from pathlib import Path

import pytest

from hpcpar.data.build import build
from hpcpar.data.store import TokenStore

WORDS = ["layout", "stage", "shard", "bucket", "schedule", "rank", "naïve", "日本語", "🙂", "def f(x):\n    return x"]
# The peak memory of this process in MiB; getrusage would report the parent's peak, since it survives fork and exec.
PRINT_PEAK = 'print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024)'


def prose(num_characters: int, seed: int) -> str:
    """Deterministic text with spaces, indentation, non-ASCII and a literal end token."""
    pieces, state, length = [], seed * 7919 + 1, 0
    while length < num_characters:
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        piece = WORDS[(state >> 33) % len(WORDS)] + (f"{state >> 50} \n" if state >> 60 == 3 else " ")
        pieces.append(piece)
        length += len(piece)
    return "".join(pieces) + "<|end|> is spelled here\n"


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six files in two folders, about 3 MB, which makes three parts."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "deep").mkdir()
    for i in range(6):
        target = folder / ("deep" if i % 2 else ".") / f"{i}.txt"
        target.write_text(prose(450_000, seed=i), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def store(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return build([texts], tmp_path_factory.mktemp("store") / "text", vocab=400, workers=1, progress=False)
