"""Chaos: a fault at a random moment of a random rank of 8, again and again, in runs that go on from one another.

    python -m tests.chaos.campaign --seeds 0:200 --out chaos.jsonl [--minutes 9]      goes on where OUT ends
    python -m tests.chaos.campaign --out chaos.jsonl --table                          the table of what has been

Eight seeds make a chain in one run folder: each start must go on from the newest set that was published, whole; at the
chain's end its losses are those of a run that nothing ever happened to, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hpcpar.checkpoint.verify import published_sets, verify_set
from hpcpar.config.load import to_toml
from hpcpar.config.run_folder import read_lines
from tests.chaos.test_failures import living
from tests.train.small import make_job, make_store

RANKS, EVERY = 8, 4
FAULTS = ("kill", "stop", "raise", "exit", "disk", "slow", "corrupt", "nan")
STEPS_A_START = 12
LIMIT_S = 90.0  # of a start: 8 ranks on few cores
SLOW_STEPS = 50
STEP_LIMIT_S = 4.0
VERDICTS = {"kill": "Died", "stop": "Stopped", "raise": "Broken", "exit": "Died"}


@dataclass
class Outcome:
    """What a seed did; `wrong` is empty if all is as it must be."""

    seed: int
    fault: str
    rank: int
    step: int
    end: str
    detect_s: float | None
    lost_steps: int
    wrong: str


class Chain:
    """One run folder, and the faults that fall on it."""

    def __init__(self, place: Path, name: str, num_ranks: int = RANKS):
        self.place, self.run, self.num_ranks = place, place / name, num_ranks
        self.job = place / "job.toml"

    def start(self, fault: str, rank: int, step: int, delay_s: float, until: int) -> tuple[int, str, float | None]:
        """Start the run, wait for its end; return code, stderr and the seconds from the fault to the end of all."""
        mark = self.place / "mark"
        mark.unlink(missing_ok=True)
        command = ["mpirun", "-n", str(self.num_ranks), sys.executable, "-m", "tests.chaos.faulty_train", fault,
                   str(rank), str(step), str(delay_s), str(mark), "train", str(self.job), "--run", str(self.run),
                   "--train.steps", str(until)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        try:
            _, error = process.communicate(timeout=LIMIT_S + 60)
        except subprocess.TimeoutExpired:
            for pid in living_pids(str(self.run)):
                os.kill(pid, signal.SIGKILL)
            process.kill()
            return -1, "HUNG", None
        limit = time.monotonic() + LIMIT_S
        while living(str(self.run)) and time.monotonic() < limit:
            time.sleep(0.05)
        end = time.time()
        return process.returncode, error, end - float(mark.read_text()) if mark.exists() else None

    def newest(self) -> int:
        """Return the step of the newest published set, after verifying it; 0 if there is none."""
        found = published_sets(self.run / "checkpoints")
        if not found:
            return 0
        return verify_set(found[-1]).step

    def reached(self) -> int:
        """Return the last step that was taken."""
        return max((line["step"] for line in read_lines(self.run / "metrics.jsonl") if "loss" in line), default=0)


def living_pids(mark: str) -> list[int]:
    """Return the processes that have `mark` on their command line."""
    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if (p / "cmdline").exists()
            and mark in (p / "cmdline").read_bytes().decode(errors="replace").split("\0")]


def strike(chain: Chain, seed: int) -> Outcome:
    """Play one seed on a chain."""
    rng = random.Random(seed)
    fault, rank, step = FAULTS[seed % len(FAULTS)], rng.randrange(chain.num_ranks), rng.randint(2, STEPS_A_START - 2)
    before = chain.newest()
    first = before + 1
    delay_s = 0.05 if fault == "slow" else rng.random() * 0.3
    until = before + (SLOW_STEPS if fault == "slow" else STEPS_A_START)
    wrong = ""
    if fault == "corrupt":
        return corrupt(chain, seed, rank, rng)
    code, error, detect_s = chain.start(fault, rank, step, delay_s, until)
    reached, newest = chain.reached(), chain.newest()
    lines = read_lines(chain.run / "metrics.jsonl")
    if first not in [line["step"] for line in lines]:
        wrong = f"did not go on from step {before}"
    elif fault in VERDICTS:
        failure = json.loads((chain.run / "failure.json").read_text())
        if code == 0 or failure["error"] != VERDICTS[fault] or failure["rank"] != rank:
            wrong = f"code {code}, verdict: rank {failure['rank']}, {failure['error']}: {failure['message']}"
        elif error.count("ROOT CAUSE") != 1:
            wrong = f"{error.count('ROOT CAUSE')} root causes were printed"
        elif detect_s is None or detect_s > 30 + (STEP_LIMIT_S if fault == "stop" else 0):
            wrong = f"took {detect_s} s"
    elif code != 0:
        wrong = f"code {code}: {error[-300:]}"
    elif fault == "disk" and not [line for line in lines if "save_failed" in line and line["step"] > before]:
        wrong = "no save failed"
    elif fault == "nan" and [line["step"] for line in lines if "skipped" in line and line["step"] > before] != [
            before + step]:
        wrong = f"skipped other steps than {before + step}"
    elif fault == "slow" and {line["slow_rank"] for line in lines if "slow_rank" in line and line["step"] > before} != {
            rank}:
        wrong = f"named {[line['slow_rank'] for line in lines if 'slow_rank' in line]} as slow"
    lost = reached - newest
    if not wrong and lost > 2 * EVERY:  # one interval to the next set, and one in which it is written meanwhile
        wrong = f"{lost} steps are lost, a set was due every {EVERY}"
    return Outcome(seed, fault, rank, before + step, f"code {code}", detect_s, lost, wrong)


def corrupt(chain: Chain, seed: int, rank: int, rng: random.Random) -> Outcome:
    """Flip a bit of the newest set: the run must not start from it, nor silently from an older one."""
    sets = published_sets(chain.run / "checkpoints")
    victim = rng.choice(sorted(sets[-1].glob("*.h5")))
    raw = bytearray(victim.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    victim.write_bytes(raw)
    start = time.time()
    code, error, _ = chain.start("none", 0, 0, 0.0, int(sets[-1].name[5:]) + STEPS_A_START)
    seconds, before = time.time() - start, int(sets[-2].name[5:])
    wrong = ""
    if code == 0 or victim.name not in error:
        wrong = f"code {code}, and no word about {victim.name}: {error[-200:]}"
    sets[-1].rename(chain.run / f"damaged-{seed}")  # what the message says that people can do
    if not wrong and chain.newest() != before:
        wrong = "the older set is not whole"
    return Outcome(seed, "corrupt", rank, int(sets[-1].name[5:]), f"code {code}", seconds, EVERY, wrong)


def compare_losses(chain: Chain, reference: Chain) -> str:
    """Return where a chain's losses differ from those of a run that nothing happened to."""
    mine, theirs = ({line["step"]: (line["loss"], line["grad_norm"], line["samples_hash"])
                     for line in read_lines(each.run / "metrics.jsonl") if "loss" in line}
                    for each in (chain, reference))
    differ = [step for step in mine if step in theirs and mine[step] != theirs[step]]
    missing = [step for step in range(1, max(mine) + 1) if step not in mine]
    return f"steps {differ[:3]} differ, {missing[:3]} are missing" if differ or missing else ""


def play(place: Path, seeds: Iterable[int], minutes: float, out: Path,
         reference_steps: int = EVERY + SLOW_STEPS + 6 * STEPS_A_START, num_ranks: int = RANKS) -> None:
    """Play seeds in chains of eight (the last, `nan`, changes the curve, so that losses are compared before it)."""
    end = time.monotonic() + 60 * minutes
    make_store(place) if not (place / "store").exists() else None
    job = make_job(place / "store", layout={"tp": 2, "pp": 2}, model={"hidden": 16, "layers": 2},
                   data={"validate_every": 0, "validate_samples": 0}, checkpoint={"every": EVERY},
                   health={"step_limit_s": STEP_LIMIT_S}, optim={"decay_steps": 1000})
    (place / "job.toml").write_text(to_toml(job))
    reference, seedling = Chain(place, "reference", num_ranks), place / "seedling"
    if not seedling.exists():  # every chain begins with a first set: without one a start in a used folder is refused
        reference.start("none", 0, 0, 0.0, EVERY)
        shutil.copytree(reference.run, seedling)
        reference.start("none", 0, 0, 0.0, reference_steps)
    for seed in seeds:
        if time.monotonic() > end:
            return
        chain = Chain(place, f"chain-{seed // len(FAULTS)}", num_ranks)
        if not chain.run.exists():
            shutil.copytree(seedling, chain.run)
        found = strike(chain, seed)
        if not found.wrong:
            found.wrong = compare_losses(chain, reference) if found.fault != "nan" else ""
        with out.open("a") as file:
            file.write(json.dumps(asdict(found)) + "\n")
        print(found, flush=True)


def table(outcomes: list[dict[str, Any]]) -> str:
    """Return the table of all outcomes."""
    by_fault: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for outcome in outcomes:
        by_fault[outcome["fault"]].append(outcome)
    lines = ["| fault | seeds | as it must be | seconds to the last rank gone: median, most | steps lost: most |",
             "|---|---|---|---|---|"]
    for fault in FAULTS:
        of = by_fault[fault]
        times = [one["detect_s"] for one in of if one["detect_s"] is not None and fault in VERDICTS]
        shown = f"{median(times):.1f}, {max(times):.1f}" if times else "-"
        if of:
            lines.append(f"| {fault} | {len(of)} | {sum(not one['wrong'] for one in of)} | {shown} | "
                         f"{max(one['lost_steps'] for one in of)} |")
    wrong = [f"seed {one['seed']}, {one['fault']}: {one['wrong']}" for one in outcomes if one["wrong"]]
    return "\n".join([*lines, "", f"{len(outcomes)} seeds, {len(wrong)} not as it must be", *wrong])


def main() -> None:
    """Play or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:200")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--place", type=Path, help="where the runs live (a temporary folder)")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if not args.table:
        first, last = map(int, args.seeds.split(":"))
        left = range(max([first, *(one["seed"] + 1 for one in done)]), last)
        place = args.place or Path(tempfile.mkdtemp())
        place.mkdir(exist_ok=True)
        play(place, left, args.minutes, args.out)
        done = [json.loads(line) for line in args.out.read_text().splitlines()]
    print(table(done))


if __name__ == "__main__":
    main()
