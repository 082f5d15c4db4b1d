"""Commands about text, and about options."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpcpar.commands.command import Command, Words, whole
from hpcpar.config.load import describe_options
from hpcpar.config.surroundings import Surroundings


def commands() -> list[Command]:
    """List this module's commands."""
    return [
        Command("data build", "text, gzip or JSONL files and folders -> a token store", _data_build, [
            ("paths", {"nargs": "+", "metavar": "PATH"}),
            ("--out", {"required": True, "type": Path, "metavar": "STORE", "help": "the store's folder"}),
            ("--vocab", {"type": whole, "help": "train a tokenizer of this size (32768)"}),
            ("--tokenizer", {"type": Path, "metavar": "FILE", "help": "use this tokenizer.json instead"}),
        ]),
        Command("data show", "counts, vocabulary, fingerprint, first words", _data_show, [("store", {"type": Path})]),
        Command("options", "list every option of a job file", _options, []),
    ]


def _data_build(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.data.build import build

    build(args.paths, args.out, vocab=args.vocab, tokenizer=args.tokenizer)
    return 0


def _data_show(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.data.store import describe

    print(describe(args.store))
    return 0


def _options(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    print(describe_options())
    return 0
