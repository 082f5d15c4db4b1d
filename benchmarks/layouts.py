"""Tokens per second and memory of the layouts, beside other programs over gloo and one process with all cores.

    python benchmarks/layouts.py [--json FILE] [--repeat 3] [--batch 8] [--steps 3] [--only 2,2,2]
    python benchmarks/layouts.py --profile 2,2,2        # what eats a layout's time, rank by rank

Every configuration is an `mpirun` of its own that trains a few steps; they take turns within a repetition, so that a
disturbance of the machine hits them alike, every other repetition backwards. A layout is written tp,pp,dp. All train
the same GPT in fp32 from the same first weights on the same tokens with fused AdamW and clipping, and a run whose
losses are not those of hpcpar's one process counts as failed. A microbatch is a replica's whole batch, with a pipeline
one sequence, at 2,2,2 also two (half of a replica's at the default batch). The peers (benchmarks/peers/) live in an
environment of their own, .venv-peers (benchmarks/peers.txt), which `make bench` makes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import mpi4py
import torch
from layouts_rank import Sizes, hpcpar_rank, hpcpars_job, save_first_weights
from peers.work import HEADS, HIDDEN, LAYERS, SEQ, VOCAB


class Candidate(NamedTuple):
    """What is started: a program on a layout."""

    program: str
    sizes: Sizes
    zero: int | None = None  # where the program leaves a choice of what is sharded over dp
    name: str = ""  # what the program is there, if more is to be said
    schedule: str = "1f1b"  # hpcpar's, of a pipeline
    microbatch: int = 1  # sequences, of a pipeline

    def __str__(self) -> str:
        more = f" ZeRO-{self.zero}" if self.zero else f" {self.schedule}" if self.schedule != "1f1b" else ""
        return (self.name or self.program) + more + f", microbatch {self.microbatch}" * (self.microbatch > 1)


ONE: Sizes = (1, 1, 1)
CANDIDATES = [
    *(Candidate("hpcpar", ONE), Candidate("plain", ONE, name="plain PyTorch"),
      Candidate("accelerate", ONE, name="transformers + Accelerate")),
    *(Candidate(program, (2, 2, 2), name=name, microbatch=n) for n in (1, 2)
      for program, name in (("hpcpar", ""), ("plain", "DTensor + Schedule1F1B + all-reduce"))),
    *(Candidate("hpcpar", (8, 1, 1)), Candidate("plain", (8, 1, 1), name="DTensor")),
    *(Candidate("hpcpar", (1, 8, 1), schedule="zero-bubble"), Candidate("hpcpar", (1, 8, 1)),
      Candidate("plain", (1, 8, 1), name="Schedule1F1B"),
      Candidate("zero_bubble", (1, 8, 1), name="ScheduleInterleavedZeroBubble")),
    *(Candidate("hpcpar", (1, 1, 8), zero) for zero in (1, 2, 3)), Candidate("plain", (1, 1, 8), name="DDP"),
    *(Candidate("fsdp2", (1, 1, 8), zero, "FSDP2") for zero in (2, 3)),
    *(Candidate("deepspeed", (1, 1, 8), zero, "DeepSpeed") for zero in (1, 2, 3)),
]
HERE = Path(__file__).resolve()
PEERS_PYTHON = HERE.parents[1] / ".venv-peers/bin/python"
TIMEOUT_S = 600
LOSS_TOLERANCE = 1e-4  # they agree to about 1e-6


class FailedError(Exception):
    """A program did not train: what it said."""


def start(candidate: Candidate, args: argparse.Namespace, profile: bool = False, weights: Path = Path()) -> dict:
    """Run one configuration in a world of its own, a peer from the weights in a file; raises FailedError."""
    sizes, environment = candidate.sizes, {**os.environ, "HPCPAR_CPU": "1"}
    size = math.prod(sizes)
    environment.pop("OMP_NUM_THREADS", None)  # hpcpar divides the cores itself
    words = [*(str(n) for n in sizes), "--batch", str(args.batch), "--steps", str(args.steps)]
    words += ["--microbatch", str(candidate.microbatch)]
    if candidate.program == "hpcpar":
        zero = {} if candidate.zero is None else {"zero": candidate.zero}
        options = json.dumps({"schedule": candidate.schedule, **zero, **json.loads(args.options)})
        command = [sys.executable, str(HERE), "--rank", *words, "--options", options, "--model", args.model]
        command += [*["--profile", "-"][:2 * profile], *["--silent"][:args.silent]]
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            environment |= {"MASTER_PORT": str(probe.getsockname()[1]), "GLOO_SOCKET_IFNAME": "lo"}
        if size > 1:
            environment["OMP_NUM_THREADS"] = "1"  # as torchrun does
        command = [str(PEERS_PYTHON), str(HERE.parent / "peers/rank.py"), candidate.program, *words]
        command += [str(weights), "--zero", str(candidate.zero or 0)]
    if size > 1:
        command = ["mpirun", "-n", str(size), *command]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise FailedError(f"{candidate} {sizes} took more than {TIMEOUT_S} s") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"seconds_per_step"')]
    if done.returncode or not lines:
        raise FailedError(f"{candidate} {sizes} failed ({done.returncode}):\n{done.stdout[-2000:]}\n"
                          f"{done.stderr[-4000:]}")
    result: dict = json.loads(lines[0])
    off = abs(result["losses"][0] - math.log(VOCAB))
    if not (off < 0.3 or args.silent):
        raise FailedError(f"{candidate} {sizes}: first loss {result['losses'][0]:.3f}, not near ln({VOCAB})")
    return result


Runs = dict[Candidate, list[dict]]  # of each repetition that worked; what failed is said on stderr


def compare(args: argparse.Namespace) -> None:
    if not PEERS_PYTHON.exists():
        sys.exit(f"{PEERS_PYTHON} is not there: make .venv-peers/ready")
    runs: Runs = {c: [] for c in CANDIDATES if c.sizes == ONE or not args.only or c.sizes == args.only}
    expected: list[float] = []
    with TemporaryDirectory() as folder:
        weights = Path(folder, "first-weights.pt")
        save_first_weights(hpcpars_job(ONE, args), weights)
        for repetition in range(args.repeat):
            for candidate in [*runs][::-1 if repetition % 2 else 1]:
                try:
                    result = start(candidate, args, weights=weights)
                    expected = expected or result["losses"]  # the first of all is hpcpar in one process
                    compare_losses(candidate, result["losses"], expected)
                except FailedError as error:
                    print(f"FAILED {error}", file=sys.stderr, flush=True)
                    continue
                result["tokens_per_s"] = args.batch * SEQ / result["seconds_per_step"]
                runs[candidate].append({"repetition": repetition, **result})
                print(f"{repetition + 1}/{args.repeat} {candidate} {candidate.sizes}: {result['tokens_per_s']:.0f} "
                      "tokens/s, losses " + " ".join(f"{x:.5f}" for x in result["losses"]), file=sys.stderr, flush=True)
    facts = machine_facts(args)
    print("\n".join(f"- {name}: {value}" for name, value in facts.items()), end="\n\n")
    print("\n".join(lines(runs)))
    print("\nMedian (min-max) over repetitions. Memory: the largest rank's, a page shared with others in parts\n"
          "(peers/work.py). hpcpar: ZeRO-1, sequence parallel, 1F1B where no other schedule is named; further options:",
          args.options)
    if args.json:
        table = [{"program": str(c), "tp_pp_dp": c.sizes, "runs": found} for c, found in runs.items()]
        args.json.write_text(json.dumps({"facts": facts, "programs": table}, indent=1))


def compare_losses(candidate: Candidate, losses: list[float], expected: list[float]) -> None:
    """Raises FailedError for a program that trains something else than hpcpar in one process."""
    worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    if worst > LOSS_TOLERANCE:
        raise FailedError(f"{candidate} {candidate.sizes}: losses {losses}, {worst:.2g} off hpcpar's {expected}")


def lines(runs: Runs) -> list[str]:
    """The table, as Markdown: every program beside hpcpar on its layout, with the same ZeRO where there is a choice."""
    speeds = {c: {run["repetition"]: run["tokens_per_s"] for run in found} for c, found in runs.items()}
    limit = max(statistics.median(speeds[c].values()) for c in runs if c.sizes == ONE and speeds[c])
    own = {(c.sizes, c.microbatch, zero): c for c in reversed(runs) if c.program == "hpcpar" for zero in (c.zero, None)}
    out = ["| tp,pp,dp | program | tokens/s | of the limit | hpcpar over it | peak MiB a rank | kept between steps |",
           "|---" * 7 + "|"]
    for candidate, found in runs.items():
        cells = [",".join(map(str, candidate.sizes)), str(candidate)]
        if found:
            mine, ours = speeds[candidate], speeds[own[candidate.sizes, candidate.microbatch, candidate.zero]]
            ratios = [ours[k] / mine[k] for k in ours.keys() & mine.keys()]
            memory = [[max(rank[kind] for rank in run["memory"]) / 2**20 for run in found] for kind in ("peak", "kept")]
            cells += [spread([*mine.values()], ".0f"), f"{statistics.median(mine.values()) / limit:.2f}",
                      spread(ratios, ".2f") if ratios else "-", *(spread(values, ".0f") for values in memory)]
        out.append("| " + " | ".join(cells if found else [*cells, "failed", *"----"]) + " |")
    return out


def spread(values: list[float], form: str) -> str:
    middle = f"{statistics.median(values):{form}}"
    return f"{middle} ({min(values):{form}}-{max(values):{form}})" if len(values) > 1 else middle


def machine_facts(args: argparse.Namespace) -> dict[str, object]:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())
    return {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "machine": f"{len(os.sched_getaffinity(0))} cores, {cpu}; 1-minute load at the end {os.getloadavg()[0]:.1f}",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}, mpi4py {mpi4py.__version__}; "
                    "peers: " + ", ".join(HERE.with_name("peers.txt").read_text().split()),
        "model": f"GPT {LAYERS} x {HIDDEN}, {HEADS} heads, seq {SEQ}, vocab {VOCAB}, tied, fp32",
        "run": f"batch {args.batch}, {args.steps} timed steps after 2, {args.repeat} repetitions, 8 ranks",
    }


def profile(args: argparse.Namespace) -> None:
    """Print wall/CPU milliseconds a step of every rank by phase."""
    columns = {  # heading -> phases
        "forward": ["F"], "backward": ["B"], "tp waits in both": ["F wait", "B wait"],
        "messages": ["rf", "sf", "rb", "sb"], "waits for messages": ["rf wait", "sf wait", "rb wait", "sb wait"],
        "reduce": ["reduce"], "reduce waits": ["reduce wait"], "update": ["update"], "gather waits": ["update wait"],
        "other": ["begin", "between", "begin wait", "between wait"],
    }
    result = start(Candidate("hpcpar", args.profile, microbatch=args.microbatch), args, profile=True)
    print(f"tp,pp,dp {args.profile}, batch {args.batch}: {result['seconds_per_step']:.3f} s a step; "
          f"wall/CPU milliseconds a step\n")
    print("| rank | " + " | ".join(columns) + " | all |\n" + "|---" * (len(columns) + 2) + "|")
    sums = [(0.0, 0.0)] * (len(columns) + 1)
    for rank, (at, phases) in enumerate(result["ranks"]):
        cells = [tuple(1e3 * sum(phases.get(p, (0, 0))[k] for p in names) for k in (0, 1))
                 for names in [*columns.values(), list(phases)]]
        sums = [(a + c, b + d) for (a, b), (c, d) in zip(sums, cells, strict=True)]
        print(f"| {rank}: {at} | " + " | ".join(f"{wall:.0f}/{cpu:.0f}" for wall, cpu in cells) + " |")
    print("| sum | " + " | ".join(f"{wall:.0f}/{cpu:.0f}" for wall, cpu in sums) + " |")
    cores = len(os.sched_getaffinity(0))
    print(f"\nThe cores could give {1e3 * cores * result['seconds_per_step']:.0f} ms of CPU a step.")


def main() -> None:
    def sizes(text: str) -> Sizes | None:
        return tuple(int(n) for n in text.split(",")) if text != "-" else None  # type: ignore[return-value]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step, over all replicas")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", type=sizes, help="a single layout beside the limit")
    parser.add_argument("--profile", type=sizes, metavar="TP,PP,DP")
    parser.add_argument("--options", default="{}", help="JSON of hpcpar [layout] options to try")
    parser.add_argument("--model", default="{}", help="JSON of hpcpar [model] options other than the benchmark's")
    parser.add_argument("--silent", action="store_true", help="hpcpar's ranks make their calls, but nothing is carried")
    parser.add_argument("--microbatch", type=int, default=1, help="sequences, of a profiled pipeline")
    parser.add_argument("--rank", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        hpcpar_rank(tuple(args.rank), args, "--profile" in sys.argv)
    elif args.profile:
        profile(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
