"""One small process a host that outlives its ranks: it tells who died or hangs, and ends the others.

    rank 0 (leader) --spawns--> witness        own session, no MPI, no torch
    rank 0 .. 7     <--watches--   |           a death closes a pipe (lifeline), a recorder has the last words and calls
    RUN/failure.json <--publishes, looks for-- |   another host's failure ends this host's ranks too
    RUN/logs/watch  <--asks, answers--         |   who is stuck is found out together (inquiry, verdict)

Started by `watch`; reads one JSON object from stdin, answers `ready`, ends when the last rank has gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import select
import signal
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hpcpar.comm.failure import Failure, appeared, death, deaths, inherit, mistake, now, say, tail
from hpcpar.comm.inquiry import ANSWER_S, BEAT_S, Charge, Inquiry, Observed, dump_stacks, process_fields, with_stacks
from hpcpar.comm.recorder import DONE, FAILED, LastWords
from hpcpar.comm.verdict import Testimony, Verdict, judge, mismatch
from hpcpar.config.run_folder import RunFolder
from hpcpar.layout.mesh import AXES, Mesh

LOOK_S = 1.0
"""How often another host's failure, and each rank, is looked at."""
PATIENCE_S = 2.0
"""How long a launcher may take to end the ranks before the witness does."""
SETTLE_S = 0.1
"""How long a death waits for the news of an earlier one; prterun stops listening 0.25 s after the first."""
STOPPED_S = 10.0
"""How long a process may be stopped: longer than a person's Ctrl-Z by mistake, shorter than all waits."""
SILENT_HOST_S = 12.0
"""How long another host's witness may give no sign."""
COMPARE_S = 5.0
"""How often the ranks' calls are compared while all seems well."""
_EXITING = 0x4  # PF_EXITING of linux/sched.h: the wait status is set before a process's files are closed


@dataclass(frozen=True)
class Task:
    """What a witness is told at its start."""

    run: str
    host: str
    size: int
    charges: tuple[Charge, ...]
    limits: dict[str, float]  # seconds without progress, by phase
    hosts: dict[str, list[int]]  # all hosts' ranks
    mesh: tuple[int, ...]
    orphaned: tuple[str, ...] = ()  # what `inherit` is to run; none on the launcher's own host

    def text(self) -> str:
        """Return the task as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Task:
        """Return the task from JSON."""
        told = json.loads(text)
        charges = tuple(Charge(**charge) for charge in told.pop("charges"))
        mesh, orphaned = (tuple(told.pop(name)) for name in ("mesh", "orphaned"))
        return cls(**told, charges=charges, mesh=mesh, orphaned=orphaned)


def places(mesh: Mesh, rank: int) -> dict[str, int]:
    """Return a rank's coordinates by axis."""
    return dict(zip(AXES, mesh.coordinates(rank), strict=True))


def process_state(pid: int) -> tuple[bool, int | None]:
    """Return whether a process is at work, and its wait status if it has begun to end and is not yet reaped."""
    fields = process_fields(pid)
    if not fields:
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
        self._observed = {charge.rank: Observed(charge, task.limits) for charge in task.charges}
        self._inquiry = Inquiry(self._run, task.host, task.hosts)
        self._clock, self._due = 0.0, {"beat": 0.0, "compare": COMPARE_S, "ask": 0.0}
        self._neighbour, self._neighbour_quiet_s = -1, 0.0
        self._orphaned = task.orphaned

    def watch(self) -> None:
        """Return when no rank is left."""
        failed_at: float | None = None
        last = time.monotonic()
        while self._deaths.alive:
            for charge in self._deaths.wait(LOOK_S):
                if self._words(charge).state != DONE:
                    self._died(charge)
            if failed_at is None and (appeared(self._run.failure) or appeared(mistake(self._run))):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() > failed_at + PATIENCE_S:
                inherit(self._orphaned)
                self._orphaned = ()
                self._deaths.kill()
            # a scheduler that suspends the job stops us too: that time counts for nobody
            passed_s, last = min(time.monotonic() - last, 3 * LOOK_S), time.monotonic()
            if failed_at is None and passed_s > LOOK_S / 2:
                self._look(passed_s)

    def _look(self, passed_s: float) -> None:
        """See whether all ranks get on, answer questions, and ask where something is wrong."""
        self._clock += passed_s
        for one in self._observed.values():
            one.look(passed_s)
        for name in self._inquiry.questions():
            self._inquiry.answer(name, self._testimonies())
        if self._is_due("beat", BEAT_S):
            self._inquiry.beat([one.testimony(0) for one in self._observed.values()])
            self._look_at_neighbour(BEAT_S)
        if self._is_due("compare", COMPARE_S):
            self._accuse(mismatch([one.testimony(512) for one in self._observed.values()], strict=False))
        if self._worried() and self._is_due("ask", 2 * ANSWER_S):
            self._inquire()

    def _is_due(self, what: str, every_s: float) -> bool:
        if self._clock < self._due[what]:
            return False
        self._due[what] = self._clock + every_s
        return True

    def _look_at_neighbour(self, passed_s: float) -> None:
        beat = self._inquiry.neighbours_beat()
        self._neighbour_quiet_s = 0.0 if beat != self._neighbour or beat < 0 else self._neighbour_quiet_s + passed_s
        self._neighbour = beat

    def _worried(self) -> bool:
        """Return whether something here needs an inquiry."""
        ranks = self._observed.values()
        stopped = [one for one in ranks if one.stopped and one.quiet_s > STOPPED_S]
        failed = any(one.words().state == FAILED and one.words().waiting >= 0 for one in ranks)
        # a host whose ranks are all stopped is suspended by its scheduler
        return (failed or any(one.overdue and not one.stopped for one in ranks) or 0 < len(stopped) < len(ranks)
                or self._neighbour_quiet_s > SILENT_HOST_S)

    def _inquire(self) -> None:
        """Ask all hosts, judge, and publish the verdict if there is one."""
        name = self._inquiry.ask()
        told = self._testimonies()
        others, silent = self._inquiry.answers(name, told)
        told += others
        unheard = [rank for host in silent for rank in self._task.hosts[host]]
        if any(one.manner == "failed" for one in told):
            self._accuse(mismatch(told, strict=True), told)
        else:
            self._accuse(judge(told, unheard, silent[0] if silent else ""), told)

    def _testimonies(self) -> list[Testimony]:
        observed = list(self._observed.values())
        return with_stacks([one.testimony() for one in observed], dump_stacks(observed))

    def _accuse(self, verdict: Verdict | None, told: Sequence[Testimony] = ()) -> None:
        """Publish and print a verdict, unless the root cause is known."""
        if verdict is None or appeared(self._run.failure):
            return
        rank, task = verdict.rank, self._task
        host = next(host for host, ranks in task.hosts.items() if rank in ranks)
        one = next((t for t in told if t.rank == rank), None) or self._inquiry.last_seen(rank)
        if not told and rank in self._observed:
            one = self._observed[rank].testimony()
        call = verdict.call or one.waiting or (one.calls[-1] if one.calls else None)
        failure = Failure(host, rank, task.size, places(Mesh(*task.mesh), rank), one.step, one.phase, one.action,
                          verdict.error, verdict.message, one.stack, str(self._run.log(rank)), now(), one.quiet_s,
                          str(call or ""))
        self._publish(failure)

    def _publish(self, failure: Failure) -> bool:
        try:
            first = failure.publish(self._run)
        except OSError:  # a full disk must not hide who it was
            first = True
        if first:
            # at once, not when the others have gone: prterun and Slurm stop listening when the ranks have ended
            say(failure.block(self._run))
            self._spoken = True
        return first

    def _words(self, charge: Charge, num_calls: int = 0) -> LastWords:
        return self._observed[charge.rank].words(num_calls)

    def _died(self, charge: Charge) -> None:
        """Publish and print the host's first death, unless the root cause is known or another host's was earlier."""
        died = time.time()
        failure, words = self._failure(charge, died), self._words(charge)
        if appeared(mistake(self._run)):
            return
        known, self._spoken = self._spoken or appeared(self._run.failure), True
        if not known and self._earliest(charge.rank, died) and self._publish(failure):
            return
        if words.state == FAILED:
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
        words = self._words(charge, 1 << 16)
        what = manner(words, status, oom_kills() > self._oom_kills)
        idle_s = None if words.noted is None else max(0.0, died - words.noted)
        return Failure(self._task.host, charge.rank, self._task.size, charge.coordinates, words.step, words.phase,
                       words.action, "Died", what, tail(words.fault), str(self._run.log(charge.rank)), now(), idle_s,
                       str(words.call or ""))


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


def wake_quickly() -> None:
    """Ask Linux 6.12 and later to run this process as soon as it wakes: a short slice needs no privilege there.

    Ranks that spin in MPI keep their processors for whole slices. Measured with two witnesses on two cores: 2 of 25
    deaths were seen 10 ms late, as the launcher killed the other witness's ranks; with it 0 of 120. Else no effect.
    """
    number = {"x86_64": 314, "aarch64": 274}.get(platform.machine())  # sched_setattr; glibc has it since 2.41 only
    if number is not None:
        size, slice_ns = 48, 100_000
        attributes = struct.pack("=IIQiIQQQ", size, os.SCHED_OTHER, 0, 0, 0, slice_ns, 0, 0)
        ctypes.CDLL(None).syscall(number, 0, attributes, 0)


def main() -> None:
    """Watch what stdin tells."""
    wake_quickly()
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        # a launcher or scheduler that ends a job signals us too, just when we are needed
        signal.signal(ignored, signal.SIG_IGN)
    witness = Witness(Task.read(sys.stdin.read()))
    os.write(1, b"ready\n")
    os.close(1)
    witness.watch()


if __name__ == "__main__":
    main()
