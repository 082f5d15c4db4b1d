"""Commands that carry checkpoints to and from Hugging Face folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpcpar.commands.command import Command, Words
from hpcpar.config.run_folder import RunFolder
from hpcpar.config.surroundings import Surroundings
from hpcpar.errors import UserError


def commands() -> list[Command]:
    """List this module's commands."""
    return [
        Command("ckpt export", "write a set as a Hugging Face folder (GPT-2 or Llama, safetensors)", _export, [
            ("path", {"type": Path, "metavar": "RUN|SET", "help": "a run folder (its newest set), or a set"}),
            ("out", {"type": Path, "metavar": "DIR", "help": "the folder to make"}),
        ]),
        Command("ckpt import", "make step 0 of a run, and a job file, from a Hugging Face folder", _import, [
            ("source", {"type": Path, "metavar": "DIR", "help": "config.json, *.safetensors, tokenizer"}),
            ("run", {"type": Path, "help": "the run folder to make"}),
        ]),
    ]


def _export(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.checkpoint.exchange import export_set
    from hpcpar.checkpoint.format import MANIFEST
    from hpcpar.checkpoint.verify import latest_set

    path = args.path if (args.path / MANIFEST).exists() else latest_set(RunFolder(args.path).checkpoints)
    if path is None:
        raise UserError(str(args.path), "has no published checkpoint", "give a run folder or a set (step-00000100)")
    print(export_set(path, args.out))
    return 0


def _import(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.checkpoint.exchange import import_folder

    print(import_folder(args.source, RunFolder(args.run)))
    return 0
