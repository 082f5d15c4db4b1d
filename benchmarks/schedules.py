"""Seconds a step of every schedule, with each chunk's compute replaced by a sleep, beside the step played on paper.

    python benchmarks/schedules.py [--pp 2 4 8] [--microbatches 4 8 16 32] [--sleep-ms 50] [--json FILE]

The executor, its messages and its autograd graphs are the trainer's own; only the network sleeps: F, I and W a sleep
each, B two. Sleeping ranks do not contend for cores, so that what is measured is the schedule and its messages.

What wakes from a sleep finds cold caches: a chunk takes longer than its sleeps, the less these are the more. So all
ranks first take the same chunks in a plain loop, without executor, schedule or messages; "in a plain loop" compares
the step with the one played on paper with those times.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "breadth-first": 2, "zero-bubble": 1, "zbv": 2, "dualpipev": 2}
TOKENS = (16, 64)  # seq, hidden of a message
LOOPS = 20


class Sleep(Function):
    """A forward and a backward that take their time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sleep_s: float, put_off: list[Any] | None) -> Tensor:
        ctx.sleep_s, ctx.put_off = sleep_s, put_off
        time.sleep(sleep_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.sleep_s)  # I
        if ctx.put_off is None:
            time.sleep(ctx.sleep_s)  # W
        else:
            ctx.put_off.append(lambda: time.sleep(ctx.sleep_s))
        return grads[0].clone(), None, None


class Sleeper(nn.Module):
    """In the place of a chunk of the network."""

    def __init__(self, first: bool, last: bool, sleep_s: float, put_off: list[Any] | None):
        super().__init__()
        self.first, self.last, self.sleep_s, self.put_off = first, last, sleep_s, put_off
        self.weight = nn.Parameter(torch.ones(1, *TOKENS))

    def forward(self, x: Tensor, targets: Tensor | None, draw: None, loss_factor: float) -> Tensor:
        out = Sleep.apply(self.weight if self.first else x, self.sleep_s, self.put_off)
        return out.sum() if self.last else out


def plain_loop(sleep_s: float) -> dict[str, float]:
    """Return the median seconds of a chunk's forward, whole backward, and the latter's two parts."""
    took: dict[str, list[float]] = {kind: [] for kind in "FBIW"}

    def timed(kind: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = work()
        took[kind].append(time.perf_counter() - start)
        return found

    put_off: list[Any] = []
    whole, split = (Sleeper(False, False, sleep_s, later) for later in (None, put_off))
    for _ in range(LOOPS):
        for chunk, kind in ((whole, "B"), (split, "I")):
            x = torch.zeros(1, *TOKENS, requires_grad=True)
            out = timed("F", lambda chunk=chunk, x=x: chunk(x, None, None, 1.0))
            timed(kind, lambda out=out: torch.autograd.backward(out, torch.ones_like(out)))
        timed("W", put_off.pop())
    return {kind: statistics.median(times) for kind, times in took.items()}


def one_rank(microbatches: list[int], sleep_s: float) -> None:
    """Play all schedules as one rank of a pipeline of all ranks; rank 0 prints what was measured and foretold."""
    from hpcpar.comm.bootstrap import connect, open_process_group
    from hpcpar.comm.groups import open_groups
    from hpcpar.comm.p2p import Neighbours
    from hpcpar.config.surroundings import Surroundings
    from hpcpar.layout.mesh import Mesh
    from hpcpar.layout.schedule import make_programs, make_schedule, play_on_paper
    from hpcpar.parallel.pipeline import Microbatch, Pipeline

    world = connect(Surroundings.read(os.environ))
    open_process_group(world)
    groups = open_groups(Mesh(pp_size=world.size), world.rank)
    nothing = Microbatch(torch.zeros(1), torch.zeros(1))
    nominal = {"F": sleep_s, "B": 2 * sleep_s, "I": sleep_s, "W": sleep_s}
    plain = dict(nominal)

    def play(name: str, num: int, sleep_s: float) -> dict[str, Any]:
        schedule = make_schedule(name, world.size, num, CHUNKS[name])
        put_off: list[Any] | None = [] if schedule.splits else None
        last = schedule.num_chunks - 1
        own = {c: Sleeper(c == 0, c == last, sleep_s, put_off) for c in range(last + 1)
               if schedule.chunk_ranks[c] == world.rank}
        neighbours = Neighbours(groups, schedule.chunk_ranks, torch.float32, world.device)
        pipeline = Pipeline(own, neighbours, TOKENS, put_off=put_off)  # type: ignore[arg-type]
        program = make_programs(schedule)[world.rank]
        world.control.barrier()
        start = time.perf_counter()
        pipeline.play(program, lambda m: nothing, 1, 1.0)
        measured = max(world.control.all_gather(time.perf_counter() - start))
        def on_paper(seconds: dict[str, float]) -> float:
            return max(span.end for span in play_on_paper(schedule, lambda a: seconds[a.kind.value]).values())

        return {"schedule": name, "pp": world.size, "microbatches": num, "chunks": CHUNKS[name],
                "measured_s": measured, "foretold_s": on_paper(nominal), "plain_s": on_paper(plain),
                "ideal_s": 3 * sleep_s * CHUNKS[name] * num}

    play("interleaved", world.size, 1e-3)  # the first backwards of a process import what torch needs: a second or two
    cases = [(name, num) for name in CHUNKS for num in microbatches
             if (name != "interleaved" or num % world.size == 0) and (name != "dualpipev" or num >= 2 * world.size)]
    world.control.barrier()
    loops = world.control.all_gather(plain_loop(sleep_s))
    plain.update({kind: statistics.mean(loop[kind] for loop in loops) for kind in nominal})
    rows = [play(name, num, sleep_s) for name, num in cases]
    if world.rank == 0:
        print(json.dumps(rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pp", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--sleep-ms", type=float, default=50)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        one_rank(args.microbatches, args.sleep_ms / 1e3)
        return 0
    rows = []
    for pp in args.pp:
        command = ["mpirun", "-n", str(pp), sys.executable, __file__, "--rank", "--sleep-ms", str(args.sleep_ms),
                   "--microbatches", *map(str, args.microbatches)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
        rows += json.loads(done.stdout.splitlines()[-1])
    print(f"{datetime.date.today()}, F = I = W = {args.sleep_ms:g} ms a chunk\n")
    print("| schedule | chunks | pp | microbatches | foretold s | measured s | off | in a plain loop | bubble |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        off, bubble = row["measured_s"] / row["foretold_s"] - 1, row["foretold_s"] / row["ideal_s"] - 1
        cells = [row[key] for key in ("schedule", "chunks", "pp", "microbatches")]
        print(f"| {' | '.join(map(str, cells))} | {row['foretold_s']:.3f} | {row['measured_s']:.3f} | {off:+.1%} | "
              f"{row['measured_s'] / row['plain_s'] - 1:+.1%} | {bubble:.1%} |")
    for foretold, what in (("foretold_s", "off"), ("plain_s", "in a plain loop")):
        offs = [row["measured_s"] / row[foretold] - 1 for row in rows]
        worst = rows[max(range(len(rows)), key=lambda i: abs(offs[i]))]
        print(f"\n{what}: {sum(abs(off) <= 0.03 for off in offs)} of {len(rows)} cases within 3%, median "
              f"{statistics.median(offs):+.1%}, worst {worst['measured_s'] / worst[foretold] - 1:+.1%}: "
              f"{worst['schedule']}, pp {worst['pp']}, {worst['microbatches']} microbatches")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
