"""The door: reads command line and environment, calls one function, turns an error into one line and an exit code."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import time
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from hpcpar.commands import calibrate, ckpt, data, exchange, health, plan, rehearse, run, submit
from hpcpar.commands.command import Command, Words
from hpcpar.config.surroundings import Surroundings, leave_stdout, mpi_network
from hpcpar.errors import HpcparError, UserError, did_you_mean

ROOMS = (plan, calibrate, rehearse, run, ckpt, exchange, submit, health, data)  # the order of the commands in --help
GROUPS = MappingProxyType({"data": "build a token store, or show one",
                           "ckpt": "look at checkpoint sets, verify, compare, prune, exchange them"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 2 the input is wrong, 3 the run failed, 75 wants to go on."""
    surroundings = Surroundings.read(os.environ)
    if surroundings.launcher == "srun":  # by hand; the batch script has done it before
        os.environ.update(mpi_network(os.environ))
    try:
        rest, words = _split(sys.argv[1:] if argv is None else argv)
        args = _parser().parse_args(rest)
        command: Command = args.chosen
        if words and not command.overrides:
            raise UserError(words[0], "is not an option of this command", f"see hpcpar {command.name} --help")
        code = command.function(args, words, surroundings)
        sys.stdout.flush()
        return code
    except HpcparError as error:
        if surroundings.rank == 0:
            print(f"hpcpar: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # a launcher that ends the others at the first exit would swallow rank 0's line
        return error.exit_code
    except BrokenPipeError:  # the reader (head, less) has seen enough
        leave_stdout()
        return 0
    except OSError as error:  # a missing permission, a full disk
        leave_stdout()
        where = f"{error.filename}: " if error.filename else ""
        who = f"rank {surroundings.rank}: " if surroundings.rank else ""  # it may be this rank's alone
        print(f"hpcpar: {who}{where}{error.strerror or error}; {_fix(error)}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, _MISTAKES) else 3


_MISTAKES = (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)


def _fix(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free space there, or choose another place"
    return "give a path that is there and that you may use" if isinstance(error, _MISTAKES) else "look at that device"


def _split(argv: Sequence[str]) -> tuple[Words, Words]:
    """Part a command line into what argparse knows and the overrides (a dotted flag and its value)."""
    rest: Words = []
    words: Words = []
    waiting = list(argv)
    while waiting:
        word = waiting.pop(0)
        if not (word.startswith("--") and "." in word.partition("=")[0]):
            rest.append(word)
            continue
        words.append(word)
        if "=" not in word and waiting and not waiting[0].startswith("--"):
            words.append(waiting.pop(0))
    return rest, words


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        unknown = re.fullmatch(r"unrecognized arguments: (-\S+).*", message)
        close = did_you_mean(unknown[1], self._option_string_actions) if unknown else ""
        raise UserError("command line", message, close if close.endswith("?") else f"see {self.prog} --help")

    def parse_known_args(self, *args: Any, **settings: Any) -> tuple[Any, list[str]]:
        """Refuse what a command does not know itself: the door's parser could not say what it does know."""
        found, rest = super().parse_known_args(*args, **settings)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hpcpar", allow_abbrev=False, epilog="any option of the job file can be given as "
                     "--table.key value; exit codes: 0 done, 2 wrong input, 3 failed, 75 stopped and wants to go on")
    top = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    groups = {"": top}
    for command in (command for room in ROOMS for command in room.commands()):
        group, _, name = command.name.rpartition(" ")
        if group not in groups:
            groups[group] = top.add_parser(group, help=GROUPS[group]).add_subparsers(
                dest="action", required=True, metavar="ACTION", parser_class=_Parser)
        made = groups[group].add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        for flag, settings in command.arguments:
            made.add_argument(flag, **settings)
        made.set_defaults(chosen=command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
