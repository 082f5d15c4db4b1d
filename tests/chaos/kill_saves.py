"""Kill -9 one rank, all ranks or the launcher while they save; look at what is left; go on from it.

    python -m tests.chaos.kill_saves [--kills 300] [--seed 1] [--asynchronous] [--folder DIR]   # make chaos-checkpoint

After each kill the newest set must be the last that a rank told of or a newer one, must verify, and must hold the bits
of its own save; the next ranks load it, on another layout.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hpcpar.checkpoint import latest_set, load_tensor, published_sets, verify_set
from tests.checkpoint.sets import reference

LAYOUTS = ((1, 1, 4), (2, 1, 2), (1, 3, 1), (4, 1, 1), (2, 2, 1), (1, 2, 2))
VICTIMS = ("one rank", "all ranks", "the launcher")
# what is there when a moment begins, and the longest time from then to the kill in seconds
MOMENTS = {"save": (".step-*.tmp", 0.08), "publish": (".step-*.tmp/manifest.json", 0.01), "any": ("told", 0.3)}
LIMIT_S = 60.0
SCRIPT, ROOT = Path(__file__).with_name("saving_ranks.py"), Path(__file__).parents[2]


def campaign(folder: Path, kills: int, seed: int, *mode: str) -> Counter[tuple[str, str]]:
    """Return how often which victim's death left the folder in which state. Raises: AssertionError on a fault."""
    dice, left = random.Random(seed), Counter()
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(kills):
        victim, moment = dice.choice(VICTIMS), dice.choice(tuple(MOMENTS))
        told = last_told(folder)
        launcher = start(folder, dice.choice(LAYOUTS), *mode)
        try:
            wait_for(launcher, lambda told=told: last_told(folder) > told)
            begun, longest_s = MOMENTS[moment]
            wait_for(launcher, lambda begun=begun: any(folder.glob(begun)))
            time.sleep(dice.random() * longest_s)
            kill(victim, launcher, folder, dice)
        finally:
            launcher.kill()
            end_ranks(folder)
            launcher.communicate()
        left[victim, state_of(folder)] += 1
        check(folder, f"kill {number}, seed {seed}: {victim}, {moment}")
    return left


def start(folder: Path, cut: tuple[int, int, int], *mode: str) -> subprocess.Popen[str]:
    """Start ranks that go on from the newest set."""
    command = ["mpirun", "-n", str(cut[0] * cut[1] * cut[2]), sys.executable, str(SCRIPT), str(folder),
               *map(str, cut), *mode]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def kill(victim: str, launcher: subprocess.Popen[str], folder: Path, dice: random.Random) -> None:
    ranks = living(folder)
    if victim == "the launcher":
        launcher.kill()
    else:
        for process in ranks if victim == "all ranks" else dice.sample(ranks, 1):
            with suppress(ProcessLookupError):  # its launcher was quicker
                os.kill(process, signal.SIGKILL)


def end_ranks(folder: Path) -> None:
    """Wait until launcher, proxy and kernel have ended ranks and writers; after a second end them ourselves."""
    end = time.monotonic() + 1
    while left := living(folder, "hpcpar.checkpoint.writer") or living(folder):
        if time.monotonic() > end:
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


def check(folder: Path, where: str) -> None:
    found, told = latest_set(folder), last_told(folder)
    assert found is not None, where
    saved = verify_set(found).state["save"]
    assert saved >= told, f"{where}: {found} is of save {saved}, rank 0 told of {told}"
    for path in published_sets(folder):
        verify_set(path)
    for kind, name in (("weight", "embedding.token.weight"), ("exp_avg_sq", "layers.2.mlp.down.weight")):
        values = load_tensor(found, name, kind, verify=False)
        expected = reference(kind, name, values.shape) * values.dtype.type(saved)
        assert values.tobytes() == expected.tobytes(), f"{where}: {kind} {name} of {found}"


def state_of(folder: Path) -> str:
    """Say what a kill left unfinished: as far as the save had come."""
    names = {entry.name.rpartition(".")[2]: entry for entry in folder.glob(".step-*.*")}
    inside = {entry.name for entry in names["tmp"].iterdir()} if "tmp" in names else set()
    if "manifest.json" in inside:
        return "all written, to be renamed" if "old" not in names else "between two renames"
    if "tmp" in names:
        return "index or shards half written" if inside else "an empty folder"
    if "old" in names or "gone" in names:
        return "an old set half deleted"
    return "nothing"


def last_told(folder: Path) -> int:
    lines = (folder / "told").read_text().split() if (folder / "told").exists() else []
    return int(lines[-1]) if lines else 0


def living(folder: Path, program: str = str(SCRIPT)) -> list[int]:
    """List the processes alive that run a program in the folder: both are in their command lines."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if words[0] == sys.executable and program in words and str(folder) in words:
            found.append(int(process.name))
    return found


def wait_for(launcher: subprocess.Popen[str], true: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not true():
        assert launcher.poll() is None, f"the ranks ended by themselves: {launcher.communicate()[1]}"
        assert time.monotonic() < end, "the ranks do not save"
        time.sleep(0.0002)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--asynchronous", action="store_true", help="save through the writers beside the ranks")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    mode, start_s = ["async"] * args.asynchronous, time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        left = campaign(Path(folder), args.kills, args.seed, *mode)
    print(f"{args.kills} kills {' '.join(mode)}, seed {args.seed}, {time.monotonic() - start_s:.0f} s: every time the "
          "newest set was whole and not older than the last one told of\n")
    print(f"| the kill left | {' | '.join(VICTIMS)} |\n|---|---|---|---|")
    for state in sorted({state for _, state in left}):
        print(f"| {state} | " + " | ".join(str(left[victim, state]) for victim in VICTIMS) + " |")


if __name__ == "__main__":
    main()
