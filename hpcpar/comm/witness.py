"""One small process a host that outlives its ranks: it tells which of them died first, and ends the others.

    rank 0 (leader) --spawns--> witness        own session, no MPI, no torch
    rank 0 .. 7     <--watches--   |           a death closes a pipe (lifeline), a status file has the last words
    RUN/failure.json <--publishes, looks for-- |   another host's failure ends this host's ranks too

Started by `watch`; reads one JSON object from stdin, answers `ready`, ends when the last rank has gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from hpcpar.comm.failure import DONE, TOLD, Failure, LastWords, appeared, death, deaths, mistake, now, say, tail
from hpcpar.config.run_folder import RunFolder

LOOK_S = 1.0
"""How often another host's failure is looked for."""
PATIENCE_S = 2.0
"""How long a launcher may take to end the ranks before the witness does."""
SETTLE_S = 0.1
"""How long a death waits for the news of an earlier one; prterun stops listening 0.25 s after the first."""
_EXITING = 0x4  # PF_EXITING of linux/sched.h: the wait status is set before a process's files are closed


@dataclass(frozen=True)
class Charge:
    """A local rank: its process, and the numbers of its status file and its lifeline's read end there."""

    rank: int
    pid: int
    fd: int
    line: int
    coordinates: dict[str, int]


@dataclass(frozen=True)
class Task:
    """What a witness is told at its start."""

    run: str
    host: str
    size: int
    charges: tuple[Charge, ...]

    def text(self) -> str:
        """Return the task as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Task:
        """Return the task from JSON."""
        told = json.loads(text)
        return cls(told["run"], told["host"], told["size"], tuple(Charge(**charge) for charge in told["charges"]))


def process_state(pid: int) -> tuple[bool, int | None]:
    """Return whether a process is at work, and its wait status if it has begun to end and is not yet reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False, None
    flags, status = int(fields[6]), int(fields[-1])
    return fields[0] not in "XZ", status if flags & _EXITING else None


class Deaths:
    """The ranks still alive, and the order in which the others died.

    Every rank holds the write end of a pipe, its lifeline; the kernel closes it as the rank dies. Measured against
    pidfds: those tell later, when the launcher, woken by a closed socket, may have killed other ranks before.
    """

    def __init__(self, charges: tuple[Charge, ...]):
        self.alive = dict(enumerate(charges))
        self._lines: dict[int, int] = {}
        self._poll = select.epoll()
        for index, charge in self.alive.items():
            with contextlib.suppress(OSError):  # dead already: the sweep over /proc finds it
                line = os.open(f"/proc/{charge.pid}/fd/{charge.line}", os.O_RDONLY | os.O_NONBLOCK)
                self._lines[line] = index
                self._poll.register(line, select.EPOLLHUP)

    def wait(self, timeout_s: float) -> list[Charge]:
        """Return who died, first death first, as soon as anyone did."""
        # epoll, unlike poll, reports in the order of the events: a launcher kills the others within milliseconds
        events = self._poll.poll(timeout_s)
        for line, _ in events:
            self._poll.unregister(line)
        dead = [self._lines[line] for line, _ in events]
        if not dead:  # a forked child may hold a dead rank's lifeline
            dead = [index for index, charge in self.alive.items() if not process_state(charge.pid)[0]]
        return [self.alive.pop(index) for index in dead if index in self.alive]

    def kill(self) -> None:
        """End the living: SIGKILL, as a rank inside a collective answers nothing else."""
        for charge in self.alive.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(charge.pid, signal.SIGKILL)


class Witness:
    """Watches one host's ranks to their end."""

    def __init__(self, task: Task):
        self._task, self._run = task, RunFolder(Path(task.run))
        self._deaths = Deaths(task.charges)
        self._oom_kills, self._spoken = oom_kills(), False
        self._status: dict[int, int] = {}
        for charge in task.charges:
            with contextlib.suppress(OSError):  # dead already
                self._status[charge.rank] = os.open(f"/proc/{charge.pid}/fd/{charge.fd}", os.O_RDONLY)

    def watch(self) -> None:
        """Return when no rank is left."""
        failed_at: float | None = None
        while self._deaths.alive:
            for charge in self._deaths.wait(LOOK_S):
                if self._words(charge).state != DONE:
                    self._died(charge)
            if failed_at is None and (appeared(self._run.failure) or appeared(mistake(self._run))):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() > failed_at + PATIENCE_S:
                self._deaths.kill()

    def _words(self, charge: Charge) -> LastWords:
        fd = self._status.get(charge.rank)
        return LastWords() if fd is None else LastWords.read(fd)

    def _died(self, charge: Charge) -> None:
        """Publish and print the host's first death, unless the root cause is known or another host's was earlier."""
        died = time.time()
        failure, words = self._failure(charge, died), self._words(charge)
        if appeared(mistake(self._run)):
            return
        known, self._spoken = self._spoken or appeared(self._run.failure), True
        if not known and self._earliest(charge.rank, died):
            try:
                first = failure.publish(self._run)
            except OSError:  # a full disk must not hide who died
                first = True
            if first:
                # at once, not when the others have gone: prterun and Slurm stop listening when the ranks have ended
                say(failure.block(self._run))
                return
        if words.state != TOLD:
            self._tell_for(charge)

    def _earliest(self, rank: int, died: float) -> bool:
        """Return whether no other host has seen an earlier death: clocks agree better than launchers kill quickly."""
        mine = death(self._run, rank, died)
        try:
            mine.touch()
            time.sleep(SETTLE_S)
            return min(deaths(self._run)) == mine
        except (OSError, ValueError):
            return True

    def _tell_for(self, charge: Charge) -> None:
        """Print the block of a rank that published its own error but was killed before it could print it."""
        try:
            known = json.loads(self._run.failure.read_text())
            if known["rank"] == charge.rank and known["error"] != "Died":
                say(Failure(**known).block(self._run))
        except (OSError, ValueError):
            pass

    def _failure(self, charge: Charge, died: float) -> Failure:
        status = process_state(charge.pid)[1]  # first of all: a parent reaps the dead within a millisecond
        words = self._words(charge)
        what = manner(words, status, oom_kills() > self._oom_kills)
        idle_s = None if words.noted is None else max(0.0, died - words.noted)
        return Failure(self._task.host, charge.rank, self._task.size, charge.coordinates, words.step, words.phase,
                       words.action, "Died", what, tail(words.fault), str(self._run.log(charge.rank)), now(), idle_s)


def manner(words: LastWords, status: int | None, oom: bool) -> str:
    """Say how a process ended, as far as its fault dump and wait status (None: reaped before that was read) tell."""
    if words.fault:
        return words.fault[0]
    if status is None:
        text = "without a word (kill -9, out of memory, or os._exit)"
    elif os.WIFSIGNALED(status):
        text = f"of {signal.Signals(os.WTERMSIG(status)).name}"
    else:
        text = f"with exit code {os.waitstatus_to_exitcode(status)} before the run was done"
    return text + ("; this host's kernel has killed a process for lack of memory since the start" if oom else "")


def oom_kills() -> int:
    """Return how many processes this host's kernel has killed for lack of memory."""
    try:
        words = Path("/proc/vmstat").read_text().split()
        return int(words[words.index("oom_kill") + 1])
    except (OSError, ValueError):
        return 0


def main() -> None:
    """Watch what stdin tells."""
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        # a launcher or scheduler that ends a job signals us too, just when we are needed
        signal.signal(ignored, signal.SIG_IGN)
    witness = Witness(Task.read(sys.stdin.read()))
    os.write(1, b"ready\n")
    os.close(1)
    witness.watch()


if __name__ == "__main__":
    main()
