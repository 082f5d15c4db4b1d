"""The command that plays a rank of a job here, or proves that all its ranks agree."""

from __future__ import annotations

import argparse
import time

from hpcpar.commands.command import Command, Words, job_argument, whole_job
from hpcpar.config.surroundings import Surroundings
from hpcpar.errors import UserError


def commands() -> list[Command]:
    """List this module's commands."""
    return [Command("rehearse", "play one rank of the whole job on this machine, communications faked",
                    _rehearse, [
        job_argument(),
        ("--rank", {"type": int, "default": 0, "help": "global rank to play (0)"}),
        ("--all", {"action": "store_true", "help": "prove that the calls of all ranks match; makes no tensor"}),
    ], overrides=True)]


def _rehearse(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.layout.layout import Layout

    layout = Layout(whole_job(args.job, words))
    size = layout.mesh.size
    if not 0 <= args.rank < size:
        raise UserError("--rank", f"{args.rank} is not among the {size} ranks", f"give 0 to {size - 1}")
    if args.all:
        from hpcpar.layout.matching import match, moves_of_layout

        start = time.perf_counter()
        matched = match(layout.mesh, moves_of_layout(layout, layout.num_microbatches))
        print(f"{matched} (proven in {time.perf_counter() - start:.1f} s)")
        return 0

    import torch

    from hpcpar.train.rehearse import describe, rehearse

    gpu = surroundings.gpus and torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    print(describe(layout, rehearse(layout, args.rank, device, real=gpu)))
    return 0
