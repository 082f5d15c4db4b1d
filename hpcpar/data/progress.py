"""Show how a build goes: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from hpcpar.units import format_bytes, format_count, format_seconds

LINE_EVERY_S = 10.0


class Done(Protocol):
    """What progress shows of a finished part."""

    @property
    def num_files(self) -> int:
        """Count of the files that end in it."""

    @property
    def num_tokens(self) -> int:
        """Count of its tokens."""

    @property
    def input_bytes(self) -> int:
        """Its bytes on disk."""


class Progress:
    """Messages and one bar, on stderr; silent if not `enabled`."""

    def __init__(self, enabled: bool):
        from rich.console import Console

        self.console = Console(stderr=True, quiet=not enabled, highlight=False, soft_wrap=True)

    def say(self, message: str) -> None:
        """Print one line."""
        self.console.print(message, markup=False)

    @contextmanager
    def bar(self, total_bytes: int, done_before: Sequence[Done]) -> Iterator[Callable[[Done], None]]:
        """Yield a function that counts one more part; `done_before` was there at the start."""
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeRemainingColumn(),
        )
        start = said = time.monotonic()
        before = sum(part.input_bytes for part in done_before)
        files = sum(part.num_files for part in done_before)
        tokens = sum(part.num_tokens for part in done_before)
        done = before
        with progress.Progress(*columns, console=self.console, disable=not self.console.is_terminal) as shown:
            task = shown.add_task("tokenizing", total=total_bytes, completed=before)

            def advance(part: Done) -> None:
                nonlocal done, files, tokens, said
                done, files, tokens = done + part.input_bytes, files + part.num_files, tokens + part.num_tokens
                now = time.monotonic()
                rate = format_bytes((done - before) / max(now - start, 1e-9))
                line = f"{files} files, {rate}/s, {format_count(tokens)} tokens"
                shown.update(task, completed=done, description=line)
                if not self.console.is_terminal and (now - said > LINE_EVERY_S or done >= total_bytes):
                    said = now
                    share = f"{format_bytes(done)} of {format_bytes(total_bytes)}"
                    self.say(f"{share}: {line}, {format_seconds(now - start)}")

            yield advance
