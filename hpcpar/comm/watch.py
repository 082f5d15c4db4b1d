"""A rank's end of the watch: notes where it is, tells its own error, and ends the whole job with it.

    with Watch.start(run, control, host, mesh, MPI.COMM_WORLD.Abort) as watch:
        watch.note(step=17, phase="forward", action="all_reduce tp")

An exception is published by the rank that raised it, a death without a word by its host's `witness`; the first to
publish RUN/failure.json is the root cause. Nothing here calls a collective once an error is known.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from hpcpar.comm.control import Control
from hpcpar.comm.failure import Failure, appeared, deaths, inherit, mistake, now, publish_once, say, tail
from hpcpar.comm.inquiry import Charge
from hpcpar.comm.recorder import DONE, FAILED, TOLD, LastWords, Recorder
from hpcpar.comm.witness import Task, places
from hpcpar.config.job import Health
from hpcpar.config.run_folder import RunFolder
from hpcpar.errors import UserError
from hpcpar.layout.mesh import Mesh

GRACE_S = 2.0
"""How long an error waits for the news of a death: a peer's lost connection raises before the death is known."""
GRACE_IN_CALL_S = 9.0
"""The same for an error inside a call: the witnesses compare all ranks' calls first, another may be the cause."""
START_S = 20.0
"""How long a witness may take to start."""
PATIENCE_S = 10.0
"""How long a rank whose error came second waits to be ended."""
CLEAN_ENDS = (None, 0, 75)
"""Codes of a SystemExit that is not a failure: done, and stopped but wants to go on."""


class Watch:
    """Watches over one rank from `start` to `done` or `failed`; as a `with` block it calls one of the two itself."""

    def __init__(self, run: RunFolder, control: Control, host: str, mesh: Mesh, abort: Callable[[int], None],
                 recorder: Recorder, orphaned: Sequence[str] = ()):
        self._run, self._host, self._abort, self.recorder = run, host, abort, recorder
        self._rank, self._size = control.rank, control.size
        self._coordinates, self._orphaned = places(mesh, control.rank), orphaned
        self.note = recorder.note  # the recorder's own method: one call less in the inner loop

    @classmethod
    def start(cls, run: RunFolder, control: Control, host: str, mesh: Mesh, abort: Callable[[int], None],
              health: Health | None = None, orphaned: Sequence[str] = ()) -> Watch:
        """Begin to watch; every rank must call. `abort(code)` ends all ranks at once (MPI.COMM_WORLD.Abort).

        `orphaned`: words to Python, run before a failed run is ended from another host than rank 0's, where the
        launcher is; it may be lost.

        An earlier start's failure.json is kept as failure-1.json and so on. With several ranks, each host's first one
        spawns the witness, a fatal signal's stack goes to the witness instead of stderr, and SIGQUIT has the rank's
        stacks written. From now on `control` records its calls. Cost: one gather, one barrier, one Python start a
        host. Raises: OSError (the run folder cannot be written).
        """
        run = RunFolder(run.path.absolute())
        if control.rank == 0:
            run.watch.mkdir(parents=True, exist_ok=True)
            put_away(run)
        recorder = control.recorder = Recorder()
        line, stacks = (lifeline(), os.memfd_create("hpcpar-stacks")) if control.size > 1 else (-1, -1)
        ranks: list[tuple[str, int, int, int, int]] = control.all_gather((host, os.getpid(), recorder.fd, line, stacks))
        if host == ranks[0][0]:
            orphaned = ()
        if control.size > 1:
            faulthandler.enable(recorder.fd, all_threads=False)
            faulthandler.register(signal.SIGQUIT, stacks, all_threads=True)
            charges = tuple(Charge(rank, pid, fd, end, places(mesh, rank), dump)
                            for rank, (its_host, pid, fd, end, dump) in enumerate(ranks) if its_host == host)
            hosts: dict[str, list[int]] = {}
            for rank, (its_host, *_) in enumerate(ranks):
                hosts.setdefault(its_host, []).append(rank)
            if charges[0].rank == control.rank:
                limits = limits_by_phase(health or Health())
                spawn(Task(str(run.path), host, control.size, charges, limits, hosts, mesh.sizes,
                           tuple(orphaned)))
            if control.rank == 0:
                run.hosts.write_text(json.dumps(hosts))
            control.barrier()  # who dies after this is watched
            os.close(line)
        return cls(run, control, host, mesh, abort, recorder, orphaned)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if error is None or (isinstance(error, SystemExit) and error.code in CLEAN_ENDS):
            self.done()
        else:
            self.failed(error)

    def done(self) -> None:
        """Tell that this rank may end."""
        self.recorder.mark(DONE)

    def failed(self, error: BaseException) -> NoReturn:
        """Publish the error as the root cause unless another was first, and end the job: code 3, a UserError's 2."""
        trace = "".join(traceback.format_exception(error))
        failure = self._failure(error, trace)
        self.recorder.mark(FAILED)
        self._log(trace)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        if isinstance(error, UserError):
            self._end(2, self._tell(lambda: publish_once(mistake(self._run), f"{error}\n"), f"hpcpar: {error}\n"))
        self._await_a_death()
        self._end(3, self._tell(lambda: failure.publish(self._run), failure.block(self._run)))

    def _failure(self, error: BaseException, trace: str) -> Failure:
        words = LastWords.read(self.recorder.fd)
        return Failure(self._host, self._rank, self._size, self._coordinates, words.step, words.phase, words.action,
                       type(error).__name__, str(error), tail(trace.splitlines()), str(self._run.log(self._rank)),
                       now(), call=str(words.call or ""))

    def _tell(self, publish: Callable[[], bool], text: str) -> bool:
        """Print the text if it is the first to be published."""
        try:
            first = publish()
        except OSError:  # a full disk may be the very error: better told twice than never
            first = True
        if first:
            say(text)
            self.recorder.mark(TOLD)
        return first

    def _await_a_death(self) -> None:
        limit = time.monotonic() + (0 if self._size == 1 else GRACE_IN_CALL_S if self.recorder.waiting
                                    else GRACE_S)
        while time.monotonic() < limit and not appeared(self._run.failure):
            time.sleep(0.1)

    def _end(self, code: int, first: bool) -> NoReturn:
        if self._size == 1:
            raise SystemExit(code)
        if not first:
            self._log("this came second: failure.json in the run folder has the root cause\n")
            time.sleep(PATIENCE_S)
        inherit(self._orphaned)
        self._abort(code)
        os._exit(code)

    def _log(self, text: str) -> None:
        with contextlib.suppress(OSError), self._run.log(self._rank).open("a") as file:
            file.write(text)


def limits_by_phase(health: Health) -> dict[str, float]:
    """Return how long a rank may be without progress in each phase."""
    phases = ("start", "first step", "validate", "save", "finish")  # they compile, or depend on disks
    return {"step": health.step_limit_s} | dict.fromkeys(phases, 6 * health.step_limit_s)


def lifeline() -> int:
    """Open a pipe whose write end stays open until this process ends; return its read end, for the witness."""
    read, write = os.pipe()
    # Linux releases a dying process's files from the highest number down: before those the launcher listens to
    held = fcntl.fcntl(write, fcntl.F_DUPFD_CLOEXEC, 200)
    os.close(write)
    os.register_at_fork(after_in_child=lambda: os.close(held))  # a forked worker must not hold it for us
    return read


def put_away(run: RunFolder) -> None:
    """Move an earlier start's failure.json to the first free failure-1.json, failure-2.json, ..."""
    for mark in (mistake(run), *deaths(run), *run.watch.glob("*")):
        mark.unlink(missing_ok=True)
    if run.failure.exists():
        number = 1
        while (kept := run.failure.with_name(f"failure-{number}.json")).exists():
            number += 1
        run.failure.rename(kept)


def spawn(task: Task) -> None:
    """Start this host's witness; without one the run goes on, and a line on stderr says so."""
    try:
        # its own session: a launcher that kills process groups leaves it alive; -m from where this package lies
        # (the run folder is there for those who read `ps`)
        process = subprocess.Popen([sys.executable, "-m", "hpcpar.comm.witness", task.run], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True, start_new_session=True,
                                   cwd=Path(__file__).resolve().parents[2])
        assert process.stdin is not None and process.stdout is not None
        with process.stdin as pipe:
            pipe.write(task.text())
        with process.stdout as pipe:
            ready = bool(select.select([pipe], [], [], START_S)[0]) and pipe.readline() == "ready\n"
    except OSError:
        ready = False
    if not ready:
        say(f"hpcpar: {task.host} has no witness: a rank killed there may not be named\n")
