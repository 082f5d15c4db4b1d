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
            ("--cluster", {"type": Path, "metavar": "FILE", "help": "a profile, as in slurm/clusters"}),
            ("--dry-run", {"action": "store_true", "help": "print the script, submit nothing"}),
            ("--until", {"default": "", "metavar": "TARGET", "help": "go on, job after job, up to so many steps "
                                                                      "(26158) or tokens (180B)"}),
            ("--sweep", {"action": "append", "default": [], "metavar": "NAME=A,B,...",
                         "help": "a run for each value, as a job array; several make a product"}),
            ("--depend", {"default": "", "metavar": "JOBID", "help": "start after this job (or afterok:ID, ...)"}),
            ("--elastic", {"action": "store_true", "help": "take fewer nodes where some are missing, at a smaller dp"}),
            ("--executor", {"choices": ("slurm", "local", "debug"), "default": "slurm", "help": "who runs it"}),
        ], overrides=True),
    ]


def _submit(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.submit.slurm import Request, submit

    if args.elastic:
        words = [*words, "--submit.elastic", "true"]
    request = Request(args.executor, args.cluster, tuple(args.sweep), args.until, args.depend, args.dry_run)
    print(submit(Path(args.job), words, run_folder(args).path, os.environ, request))
    return 0
