"""Commands that make Slurm jobs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hpcpar.commands.command import Command, Words, job_argument, run_argument, run_folder
from hpcpar.config.surroundings import Surroundings


def commands() -> list[Command]:
    """List this module's commands."""
    return [
        Command("submit", "make a Slurm job of it (or run it here through submitit's local executor)", _submit, [
            job_argument(), run_argument(),
            ("--dry-run", {"action": "store_true", "help": "print the script, submit nothing"}),
            ("--executor", {"choices": ("slurm", "local", "debug"), "default": "slurm", "help": "who runs it"}),
        ], overrides=True),
    ]


def _submit(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.submit.slurm import submit

    folder = run_folder(args)
    submission = submit(Path(args.job), words, folder.path, os.environ, executor=args.executor, dry_run=args.dry_run)
    print(submission)
    return 0
