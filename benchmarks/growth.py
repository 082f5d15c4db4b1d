"""How hpcpar's speed changes as work and ranks grow, and what communication costs each layout.

    python benchmarks/growth.py [--repeat 2] [--out docs/growth]     # writes OUT.md, OUT.png and OUT.json
    python benchmarks/growth.py --floor                              # prints the second ratio alone, beside the first

Every point is an `mpirun` of its own (benchmarks/layouts.py); points take turns within a repetition. Two ratios:
"of one process": against one process with all cores that trains the same model on the same batch;
"of silent": against the same ranks that make the same calls, but carry nothing: what compute alone leaves on this
hardware, where all ranks share the cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from layouts import ONE, Candidate, Sizes, machine_facts, spread, start
from peers.work import HIDDEN, LAYERS, SEQ

BATCH = 16


@dataclass(frozen=True)
class Point:
    """One configuration: a layout, and what differs from the benchmark's model and batch."""

    sizes: Sizes
    layers: int = LAYERS
    hidden: int = HIDDEN
    batch: int = BATCH
    microbatch: int = 1  # sequences, of a pipeline
    silent: bool = False

    def tokens_per_s(self, steps: int) -> float:
        model = json.dumps({"layers": self.layers, "hidden": self.hidden})
        args = argparse.Namespace(batch=self.batch, steps=steps, options="{}", model=model, silent=self.silent)
        candidate = Candidate("hpcpar", self.sizes, microbatch=self.microbatch)
        return self.batch * SEQ / start(candidate, args)["seconds_per_step"]

    def beside(self, sizes: Sizes, silent: bool = False) -> Point:
        """Return the same work on another layout, or without communication."""
        return replace(self, sizes=sizes, silent=silent, microbatch=1 if sizes == ONE else self.microbatch)


CURVES: dict[str, dict[float, Point]] = {
    "ranks, as dp": {n: Point((1, 1, n)) for n in (1, 2, 4, 8, 16)},
    "ranks, as tp": {n: Point((n, 1, 1)) for n in (1, 2, 4, 8)},
    "ranks, as pp": {n: Point((1, n, 1)) for n in (1, 2, 4, 8)},
    "hidden at 2,2,2": {n: Point((2, 2, 2), hidden=n) for n in (256, 512, 1024)},
    "layers at 2,2,2": {n: Point((2, 2, 2), layers=n) for n in (4, 8, 16)},
    "microbatches at pp 8": {n: Point((1, 8, 1), batch=n) for n in (4, 8, 16, 32)},
}
SILENT = [Point(sizes, batch=batch, microbatch=size) for sizes, size in (
    ((2, 2, 2), 1), ((2, 2, 2), 2), ((8, 1, 1), 1), ((1, 8, 1), 1), ((1, 1, 8), 1)) for batch in (8, 32)]


def measure(points: list[Point], repeat: int, steps: int) -> dict[Point, list[float]]:
    found: dict[Point, list[float]] = {point: [] for point in points}
    for repetition in range(repeat):
        for number, (point, values) in enumerate(found.items()):
            values.append(point.tokens_per_s(steps))
            print(f"{repetition + 1}/{repeat} {number + 1}/{len(found)} {point}: {values[-1]:.0f} tokens/s",
                  file=sys.stderr, flush=True)
    return found


def lines(found: dict[Point, list[float]]) -> list[str]:
    """The tables, as Markdown."""
    middle = {point: statistics.median(values) for point, values in found.items()}
    out = ["| what grows | | tokens/s | of one process |", "|---|---|---|---|"]
    for name, curve in CURVES.items():
        out += [f"| {name} | {at:g} | {spread(found[point], '.0f')} | {middle[point] / middle[point.beside(ONE)]:.2f} |"
                for at, point in curve.items()]
    return [*out, "", *floor_lines(found)]


def floor_lines(found: dict[Point, list[float]]) -> list[str]:
    """Every layout beside the same ranks that carry nothing, and beside one process, as Markdown."""
    middle = {point: statistics.median(values) for point, values in found.items()}
    out = ["| tp,pp,dp | batch (microbatch) | tokens/s | silent ranks | of silent | of one process |", "|---" * 6 + "|"]
    for point in SILENT:
        silent = point.beside(point.sizes, silent=True)
        ratios = [a / b for a, b in zip(found[point], found[silent], strict=True)]  # neighbours in time
        batch = f"{point.batch} ({point.microbatch})" if point.sizes[1] > 1 else point.batch
        out.append(f"| {','.join(map(str, point.sizes))} | {batch} | {spread(found[point], '.0f')} | "
                   f"{spread(found[silent], '.0f')} | {spread(ratios, '.2f')} | "
                   f"{middle[point] / middle[point.beside(ONE)]:.2f} |")
    return out


def draw(found: dict[Point, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (name, curve) in zip(figure.subplots(2, 3).flat, CURVES.items(), strict=True):
        for label, points in (("this layout", list(curve.values())),
                              ("one process", [point.beside(ONE) for point in curve.values()])):
            axes.plot(list(curve), [statistics.median(found[point]) for point in points], "o-", label=label)
        axes.set(title=name, xscale="log", ylabel="tokens/s", ylim=0)
        axes.set_xticks(list(curve), [f"{at:g}" for at in curve])
        axes.minorticks_off()
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--floor", action="store_true", help="only what communication costs, at batches of 8 and 32")
    parser.add_argument("--out", type=Path, default=Path("docs/growth"))
    args = parser.parse_args()
    grown = [] if args.floor else [point for curve in CURVES.values() for point in curve.values()]
    points = [p for point in [*SILENT, *grown] for p in (point, point.beside(ONE))]
    points += [point.beside(point.sizes, silent=True) for point in SILENT]
    points = sorted(set(points), key=lambda p: (p.batch, p.hidden, p.layers, p.sizes, p.microbatch, p.silent))
    found = measure(points, args.repeat, args.steps)
    facts = machine_facts(argparse.Namespace(batch=f"{BATCH} where not said", steps=args.steps, repeat=args.repeat))
    if args.floor:
        print("\n".join([*(f"- {name}: {value}" for name, value in facts.items()), "", *floor_lines(found)]))
        return
    table = ["# Speed as work and ranks grow", "", f"`python benchmarks/growth.py` ({Path(__file__).name} says what is "
             "compared); median (min-max).", *(f"- {name}: {value}" for name, value in facts.items()), "",
             f"![tokens/s]({args.out.name}.png)", "", *lines(found)]
    args.out.with_suffix(".md").write_text("\n".join(table) + "\n")
    draw(found, args.out.with_suffix(".png"))
    speeds = [{**vars(point), "tokens_per_s": values} for point, values in found.items()]
    args.out.with_suffix(".json").write_text(json.dumps({"facts": facts, "speeds": speeds}, indent=1))
    print("\n".join(table))


if __name__ == "__main__":
    main()
