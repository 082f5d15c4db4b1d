"""The one error family: every message says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HpcparError(Exception):
    """Root of all errors that hpcpar raises on purpose; `exit_code` is what the command returns."""

    exit_code = 3


class UserError(HpcparError):
    """The user's input is wrong: printed as one line on stderr, exit code 2, no traceback.

    `where` is a field (`layout.tp`), file or flag; `rule` what it breaks; `fix` the nearest thing that works.
    """

    exit_code = 2

    def __init__(self, where: str, rule: str, fix: str = ""):
        self.where, self.rule, self.fix = where, rule, fix
        super().__init__(f"{where}: {rule}" + (f"; {fix}" if fix else ""))

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        """Let it travel between ranks: the three words, not the sentence made of them."""
        return type(self), (self.where, self.rule, self.fix)


class RunError(HpcparError):
    """A run failed for a reason that is not the user's input (exit code 3, failure.json)."""


class CheckpointError(RunError):
    """A checkpoint set is missing, torn or not what its manifest says; names files and tensors hit."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "did you mean X?" for the closest known word, else the list of known ones."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
