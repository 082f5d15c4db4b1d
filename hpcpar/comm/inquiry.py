"""How the witnesses of all hosts find out together who is stuck: questions and answers in RUN/logs/watch.

    beat-HOST                 rewritten every 2 s by each witness; the witness of the next host looks at it
    ask-NAME                  a question: what do you know of your ranks?
    answer-NAME.HOST.json     one host's testimonies

Files, because the run folder is the one thing that all hosts, and a login node that asks for stacks, share.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hpcpar.comm.recorder import DONE, FAILED, TOLD, Call, LastWords
from hpcpar.comm.verdict import Testimony
from hpcpar.config.run_folder import RunFolder

BEAT_S = 2.0
ANSWER_S = 6.0
"""How long the other hosts' answers are waited for."""
_STACK_S = 0.3  # the interpreter writes a rank's stacks within milliseconds
_TOLD_CALLS = 100


@dataclass(frozen=True)
class Charge:
    """A local rank: its process, and the numbers there of its recorder, its lifeline's read end and its stacks."""

    rank: int
    pid: int
    fd: int
    line: int
    coordinates: dict[str, int]
    stacks: int = -1


def process_fields(pid: int) -> list[str]:
    """Return what /proc/PID/stat says after the name; nothing for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


class Observed:
    """One local rank as its witness sees it: its recorder, and what the kernel accounts for its process.

    The kernel's account is the heartbeat: it needs neither the rank's interpreter lock nor a thread of its own.
    """

    def __init__(self, charge: Charge, limits: Mapping[str, float]):
        self.charge, self._limits = charge, limits
        self._fds: dict[str, int] = {}
        for name, fd in (("words", charge.fd), ("stacks", charge.stacks)):
            with contextlib.suppress(OSError):  # dead already
                self._fds[name] = os.open(f"/proc/{charge.pid}/fd/{fd}", os.O_RDONLY)
        self.quiet_s, self._seen, self._ticks_then, self._ticks = 0.0, (0.0, -1, -1, False), 0, 0
        self.letter = ""

    def words(self, num_calls: int = 0) -> LastWords:
        """Return what the recorder says, by default without its calls."""
        return LastWords.read(self._fds["words"], num_calls) if "words" in self._fds else LastWords()

    def look(self, passed_s: float) -> None:
        """Look at the rank again, `passed_s` after the last time."""
        words, fields = self.words(), process_fields(self.charge.pid)
        self.letter = fields[0] if fields else ""
        self._ticks = int(fields[11]) + int(fields[12]) if fields else self._ticks
        seen = (words.noted or 0.0, words.begun, words.waiting, self.letter == "T")
        if seen != self._seen:
            self._seen, self.quiet_s, self._ticks_then = seen, 0.0, self._ticks
        else:
            self.quiet_s += passed_s

    @property
    def stopped(self) -> bool:
        """Whether the process is stopped by a signal; one that a debugger holds is not."""
        return self.letter == "T"

    @property
    def overdue(self) -> bool:
        """Whether the rank has been quiet beyond its phase's limit."""
        return self.quiet_s > self._limit(self.words().phase)

    def _limit(self, phase: str) -> float:
        return self._limits.get(phase, max(self._limits.values()))

    def testimony(self, num_calls: int = _TOLD_CALLS) -> Testimony:
        """Return what is known of the rank now."""
        words = self.words(num_calls)
        manner = {DONE: "done", FAILED: "failed", TOLD: "failed"}.get(words.state, "working")
        waiting = words.call if words.waiting >= 0 else None
        if manner == "working":
            manner = ("gone" if not self.letter or self.letter in "XZ" else "stopped" if self.stopped
                      else "waiting" if waiting else "working")
        # a tenth of the quiet time on the processor is more than a blocked thread needs to look around
        busy = self._ticks - self._ticks_then > self.quiet_s * os.sysconf("SC_CLK_TCK") / 10
        return Testimony(self.charge.rank, manner, self.quiet_s, busy, self._limit(words.phase), words.step,
                         words.phase, words.action, waiting, words.calls)


def dump_stacks(observed: Sequence[Observed]) -> dict[int, tuple[str, ...]]:
    """Return the main thread's Python stack of each rank; a stopped rank has none.

    The interpreter's own signal handler writes it in C, whatever the rank is waiting for; nothing is attached.
    """
    sizes = {}
    for one in observed:
        fd = one._fds.get("stacks")
        if fd is not None and one.letter and one.letter not in "TXZ":
            sizes[one.charge.rank] = (fd, os.fstat(fd).st_size)
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.charge.pid, signal.SIGQUIT)
    time.sleep(_STACK_S)
    return {rank: main_stack(os.pread(fd, 1 << 18, size).decode(errors="replace"))
            for rank, (fd, size) in sizes.items()}


def main_stack(text: str) -> tuple[str, ...]:
    """Return the lines of the thread that got the signal (the main one), most recent call first."""
    lines = text.partition("Current thread")[2].split("\n")[1:]
    found = []
    for line in lines:
        match = re.match(r'\s+File "(.*)", line (\d+) in (.*)', line)
        if not match:
            break
        found.append(f"{match[1]}:{match[2]} in {match[3]}")
    return tuple(found)


class Inquiry:
    """One host's part in the questions and answers."""

    def __init__(self, run: RunFolder, host: str, hosts: Mapping[str, Sequence[int]]):
        self.folder, self._host, self._hosts = run.watch, host, hosts
        self._answered: set[str] = set()
        self._count = self._beats = 0

    def beat(self, told: Sequence[Testimony]) -> None:
        """Show that this host is there, and where its ranks are."""
        self._beats += 1
        rows = [[one.rank, one.step, one.phase, one.manner, round(one.quiet_s, 1)] for one in told]
        _put(self.folder / f"beat-{self._host}", {"count": self._beats, "time": time.time(), "ranks": rows})

    def neighbours_beat(self) -> int:
        """Return the number of the next host's last beat; -1 where there is no next host, or no beat of it."""
        names = sorted(self._hosts)
        other = names[(names.index(self._host) + 1) % len(names)]
        return -1 if other == self._host else self._beat_of(other)

    def _beat_of(self, host: str) -> int:
        return int(_get(self.folder / f"beat-{host}").get("count", -1))

    def last_seen(self, rank: int) -> Testimony:
        """Return what its host's last beat said of a rank; quiet since then."""
        host = next(host for host, ranks in self._hosts.items() if rank in ranks)
        beat = _get(self.folder / f"beat-{host}")
        for one, step, phase, manner, quiet_s in beat.get("ranks", []):
            if one == rank:
                return Testimony(rank, manner, quiet_s + max(0.0, time.time() - beat["time"]), step=step, phase=phase)
        return Testimony(rank, "working")

    def questions(self) -> list[str]:
        """Return the names of questions that this host has not answered yet."""
        try:
            names = {path.name[4:] for path in self.folder.iterdir() if path.name.startswith("ask-")}
        except OSError:
            return []
        new = sorted(names - self._answered)
        self._answered |= names
        return new

    def answer(self, name: str, told: Sequence[Testimony]) -> None:
        """Answer a question."""
        _put(self.folder / f"answer-{name}.{self._host}.json", {"told": [asdict(one) for one in told]})

    def ask(self) -> str:
        """Ask all hosts; this one need not answer itself."""
        self._count += 1
        name = f"{self._host}-{self._count}"
        self._answered.add(name)
        (self.folder / f"ask-{name}").touch()
        return name

    def answers(self, name: str, mine: Sequence[Testimony]) -> tuple[list[Testimony], list[str]]:
        """Return the other hosts' testimonies, and the hosts that neither answer nor beat any more.

        Meanwhile `mine` answers those who ask at the same time: two that only waited for one another would both take
        the other for silent. A host without a witness has never had a beat, and is not silent.
        """
        hosts = [host for host in self._hosts if host != self._host]
        beats = {host: self._beat_of(host) for host in hosts}

        def answer_others() -> None:
            for other in self.questions():
                self.answer(other, mine)

        told, late = await_answers(self.folder, name, hosts, answer_others)
        return told, [host for host in late if 0 <= beats[host] == self._beat_of(host)]


def await_answers(folder: Path, name: str, hosts: Sequence[str], meanwhile: Callable[[], None] = lambda: None,
                  ) -> tuple[list[Testimony], list[str]]:
    """Wait for the answers of hosts to a question; return the testimonies, and the hosts that did not answer."""
    told: list[Testimony] = []
    silent, end = list(hosts), time.monotonic() + ANSWER_S
    while silent and time.monotonic() < end:
        meanwhile()
        for host in list(silent):
            answer = _get(folder / f"answer-{name}.{host}.json")
            if answer:
                silent.remove(host)
                told += [_read_testimony(one) for one in answer["told"]]
        if silent:
            time.sleep(0.2)
    return told, silent


def with_stacks(told: Sequence[Testimony], stacks: Mapping[int, tuple[str, ...]]) -> list[Testimony]:
    """Add their stacks to testimonies."""
    return [replace(one, stack=stacks.get(one.rank, ())) for one in told]


def _read_testimony(told: dict[str, Any]) -> Testimony:
    calls = tuple(Call(**call) for call in told.pop("calls"))
    waiting, stack = told.pop("waiting"), tuple(told.pop("stack"))
    return Testimony(**told, calls=calls, waiting=Call(**waiting) if waiting else None, stack=stack)


def _put(path: Path, value: dict[str, Any]) -> None:
    draft = path.with_name(f".{path.name}.draft")
    with contextlib.suppress(OSError):  # a full disk must not end the witness
        draft.write_text(json.dumps(value))
        draft.rename(path)


def _get(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    except (OSError, ValueError):
        return {}
