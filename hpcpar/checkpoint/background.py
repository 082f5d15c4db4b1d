"""Save while the caller goes on: it copies its shards to shared memory, a child writes them, only the caller publishes.

    saver.shards[kind][bucket][:] = ...        the only bytes that the caller waits for
    saver.start(step, state)                   one small all-gather
    ... saver.busy on some rank: go on ...
    saver.advance()                            on all ranks, once none is busy: a few times, until a set is published

No rank ever waits for another's disk, but in `finish`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hpcpar.checkpoint.memory import Memory, remember
from hpcpar.checkpoint.save import Published, save_phases
from hpcpar.checkpoint.tasks import Array, Saving
from hpcpar.checkpoint.writer import charge, staged
from hpcpar.comm.control import Control
from hpcpar.errors import CheckpointError

_logger = logging.getLogger(__name__)
# what stops a job: the rank decides what that means for its writer
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class BackgroundSaver:
    """Saves sets beside the caller's work, one at a time; all but `busy` must be called by every rank."""

    def __init__(self, saving: Saving, control: Control, kinds: Mapping[str, str], memory: Memory | None = None,
                 note: Callable[[str], None] = _logger.warning):
        """Spawn the writer. `kinds` gives each kind's dtype. Memory: the rank's shards once more, on the host.

        With `memory`, each set is kept there before it is written to disk; `note` is told where that fails.
        """
        self._saving = saving._replace(checkpoints=saving.checkpoints.absolute())
        self._control, self._memory, self._note = control, memory, note
        self._writer = ChildWriter(self._saving, control.rank, kinds)
        self._phases: Iterator[Published | None] | None = None
        self.shards = self._writer.shards

    @property
    def busy(self) -> bool:
        """Whether this rank's writer is at work."""
        return self._writer.busy

    @property
    def active(self) -> bool:
        """Whether a save is in hand; the same on all ranks."""
        return self._phases is not None

    def start(self, step: int, state: Mapping[str, Any]) -> None:
        """Begin to save what is in `shards`; they must not change until the set is published or has failed.

        Raises: CheckpointError on all ranks, if the set's folder cannot be made.
        """
        assert self._phases is None, "one save at a time"
        self._writer.rest()
        phases = self._play(step, state)
        next(phases)
        self._phases = phases

    def advance(self) -> Published | None:
        """Go on with the save in hand; return the set if it has just been published.

        Waits for this rank's writer, so call it when none is busy. Raises: CheckpointError on all ranks.
        """
        if self._phases is None:
            return None
        try:
            return next(self._phases)
        except StopIteration:
            self._phases = None
        except CheckpointError:
            self._phases = None
            raise
        return None

    def finish(self) -> Published | None:
        """Wait for the save in hand, if any; return the set, if it was not yet published. Raises: CheckpointError."""
        found = None
        try:
            while self._phases is not None:
                found = self.advance() or found
        finally:
            self._writer.rest()  # it may be clearing away what has failed
        return found

    def _play(self, step: int, state: Mapping[str, Any]) -> Iterator[Published | None]:
        if self._memory is not None:
            try:
                yield from remember(self._memory, step, state, self._control, self._writer)
            except CheckpointError as error:
                self._note(f"{error}; the disk has to do")
        yield from save_phases(self._saving, step, state, self._control, self._writer)

    def close(self) -> None:
        """End the writer; a save in hand is given up."""
        self._writer.close()


class ChildWriter:
    """A rank's writer, and the shared memory that it reads. A writer that dies is replaced, and asked again once."""

    def __init__(self, saving: Saving, global_rank: int, kinds: Mapping[str, str]):
        self._rank = global_rank
        num_bytes, _ = staged(None, saving.layout, global_rank, kinds)
        # a memory file has no name: nothing is left of it, whatever ends the two processes
        self._memory_fd = os.memfd_create("hpcpar-staging")
        os.ftruncate(self._memory_fd, max(1, num_bytes))
        # populated now: a first touch costs more than the copy, and too little memory should show before step 1
        memory = mmap.mmap(self._memory_fd, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.shards: dict[str, list[Array]] = staged(memory, saving.layout, global_rank, kinds)[1]
        self._charge = charge(saving, global_rank, kinds, self._memory_fd)
        self._where = [str(saving.checkpoints), f"rank-{global_rank:05d}"]  # for those who read `ps`
        self._task = ""  # the one asked for and not yet answered
        self._tries = 0
        self._answer: dict[str, Any] = {}
        self._child: subprocess.Popen[bytes] | None = self._spawn()

    @property
    def busy(self) -> bool:
        """Whether a task is not yet answered; does not wait."""
        self._listen(0)
        return bool(self._task)

    def ask(self, task: str, **values: Any) -> None:
        """Send a task; see `Tasks`."""
        assert not self._task, "one task at a time"
        self._task, self._tries = json.dumps({"task": task, **values}), 0
        self._send()

    def answer(self) -> Any:
        """Wait for the task's end; return its answer. Raises: CheckpointError with the reason of a failure."""
        self.rest()
        if "failed" in self._answer:
            raise CheckpointError(self._answer["failed"])
        return self._answer["done"]

    def rest(self) -> None:
        """Wait until nothing is asked for any more."""
        while self._task:
            self._listen(None)

    def close(self) -> None:
        """End the child at once."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _spawn(self) -> subprocess.Popen[bytes]:
        # a child inherits what is blocked, so that a signal to the whole job never ends it in the midst of a write;
        # -m from where this package lies
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            child = subprocess.Popen([sys.executable, "-m", "hpcpar.checkpoint.writer", *self._where],
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(self._memory_fd,),
                                     cwd=Path(__file__).resolve().parents[2])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        _write_line(child, self._charge)
        return child

    def _send(self) -> None:
        self._tries += 1
        try:
            self._child = self._child or self._spawn()
        except OSError as error:
            self._end({"failed": f"its writer cannot be started: {error}"})
            return
        _write_line(self._child, self._task)

    def _listen(self, timeout_s: float | None) -> None:
        """Take the answer if there is one within the time."""
        if not self._task:
            return
        assert self._child is not None and self._child.stdout is not None
        if select.select([self._child.stdout], [], [], timeout_s)[0]:
            line = self._child.stdout.readline()
            if line.endswith(b"\n"):
                self._end(json.loads(line))
            else:
                self._bury(self._child)

    def _end(self, answer: dict[str, Any]) -> None:
        self._answer, self._task = answer, ""

    def _bury(self, child: subprocess.Popen[bytes]) -> None:
        """Start another child for one that has died; it gets the task, unless that has killed two."""
        child.communicate()
        how = f"exit code {child.returncode}" if child.returncode >= 0 else signal.Signals(-child.returncode).name
        print(f"hpcpar: the checkpoint writer of rank {self._rank} has died ({how})", file=sys.stderr, flush=True)
        self._child = None
        if self._tries < 2:
            self._send()
        else:
            self._end({"failed": f"its writer died twice ({how})"})


def _write_line(child: subprocess.Popen[bytes], text: str) -> None:
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # dead: its closed stdout will say so
        child.stdin.write(text.encode() + b"\n")
        child.stdin.flush()

