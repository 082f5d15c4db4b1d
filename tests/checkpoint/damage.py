"""Spoil sets at random; every damage must be reported with its file, and the tensors hit, before HDF5 opens a file.

    python -m tests.checkpoint.damage [--damages 1000] [--seed 1]        # make damage-checkpoint
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from hpcpar.checkpoint import load_shards, verify_set
from hpcpar.errors import CheckpointError
from hpcpar.layout.layout import Layout
from tests.checkpoint.sets import GPT, make_layout, save

WAYS = ("cut", "flip", "grow", "lose", "swap", "zero")


def damage(path: Path, dice: random.Random) -> tuple[str, str]:
    """Spoil a set in one way; return the way and the name of a file that is hit."""
    files = sorted(path.iterdir())
    file, way = dice.choice(files), dice.choice(WAYS)
    raw = file.read_bytes()
    if way == "cut":
        file.write_bytes(raw[: dice.randrange(len(raw))])
    elif way == "flip":
        at = dice.randrange(len(raw))
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << dice.randrange(8)]) + raw[at + 1 :])
    elif way == "grow":
        file.write_bytes(raw + b"\0")
    elif way == "lose":
        file.unlink()
    elif way == "zero":
        file.write_bytes(bytes(len(raw)))
    else:
        other = dice.choice([f for f in files if f != file])
        file.write_bytes(other.read_bytes())
        other.write_bytes(raw)
    return way, file.name


def check_one(good: Path, layout: Layout, dice: random.Random) -> tuple[str, str, float]:
    """Spoil a copy of a set; return the way, the kind of file, and the seconds until verify and load have refused it.

    Raises: AssertionError if either passes, or names neither the file nor the manifest, or no tensor of a shard file.
    """
    bad = good.parent.with_name("bad") / good.name
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(good, bad)
    way, hit = damage(bad, dice)
    refused = {"verify_set": lambda: verify_set(bad)}
    if hit.startswith("shard"):  # a load reads no index
        refused["load_shards"] = lambda: load_shards(bad, layout, 0, "float32")
    start = time.perf_counter()
    for name, work in refused.items():
        try:
            work()
        except CheckpointError as error:
            of_shard = rf"{hit} .*tensors hit: \w+" if hit.startswith("shard") else hit
            assert re.search(rf"{of_shard}|manifest\.json: (damaged|cannot be read)", str(error)), (way, hit, error)
        else:
            raise AssertionError(f"{name} has not seen: {way} {hit}")
    return way, re.sub(r"-\d+", "", hit), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    dice, taken = random.Random(args.seed), defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        good = save(Path(folder) / "good", 1, make_layout({**GPT, "hidden": 64, "vocab": 5003}, 2, 1, 2))
        layout = make_layout({**GPT, "hidden": 64, "vocab": 5003})
        size = sum(file.stat().st_size for file in good.iterdir())
        for _ in range(args.damages):
            way, file, seconds = check_one(good, layout, dice)
            taken[way, file].append(seconds)
    files = sorted({file for _, file in taken})
    slowest = max(seconds for each in taken.values() for seconds in each)
    print(f"{args.damages} damages of a set of {size / 2**20:.1f} MiB, seed {args.seed}: all reported; the slowest "
          f"report took {slowest * 1000:.0f} ms\n\n| damage | {' | '.join(files)} |\n|---|{'---|' * len(files)}")
    for way in WAYS:
        print(f"| {way} | {' | '.join(str(len(taken[way, file])) for file in files)} |")


if __name__ == "__main__":
    main()
