"""What a command is, and what commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpcpar.config.job import Job
from hpcpar.config.load import load_job
from hpcpar.config.resolve import resolve
from hpcpar.config.run_folder import RunFolder
from hpcpar.config.surroundings import Surroundings
from hpcpar.units import COUNTS

Words = list[str]  # overrides such as --layout.tp 4
Argument = tuple[str, dict[str, Any]]  # of argparse: its name and its settings


class Command(NamedTuple):
    """One command: `name` is "train", or "data build" for an action of a group."""

    name: str
    help: str
    function: Callable[[argparse.Namespace, Words, Surroundings], int]  # returns the exit code; imports inside
    arguments: Sequence[Argument]
    overrides: bool = False  # whether it takes --table.key value


def positive(text: str) -> float:
    """Read a number above 0 from the command line; K, M, B and T are thousands and so on."""
    factor = COUNTS.get(text[-1:], 1.0)
    try:
        number = float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def whole(text: str) -> int:
    """Read a whole number above 0 from the command line."""
    number = positive(text)
    if number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(number)


def job_argument() -> Argument:
    """Declare the job file."""
    return ("job", {"help": "a job file (TOML)"})


def run_argument() -> Argument:
    """Declare the run folder of a command that takes a job."""
    return ("--run", {"type": Path, "metavar": "DIR", "help": "run folder (default: runs/NAME OF THE JOB)"})


def run_folder(args: argparse.Namespace) -> RunFolder:
    """Return the run folder that the arguments name."""
    return RunFolder(args.run or Path("runs") / Path(args.job).stem)


def whole_job(path: str | Path, words: Words, num_ranks: int | None = None) -> Job:
    """Return the job of a file, checked and complete, what is left to the planner included.

    Raises UserError as `load_job`, `resolve` and `choose_recompute` do.
    """
    from hpcpar.planner.recompute import choose_recompute

    return choose_recompute(resolve(load_job(path, words), num_ranks))
