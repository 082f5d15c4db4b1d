"""One run at a time in a folder: two would replace each other's sets.

The file RUNNING says which process is at work there. It appears whole or not at all, without a lock (locks fail or hang
on many cluster file systems), and outlives only a run that was killed: then what it names is not alive any more.
"""

from __future__ import annotations

import json
import os
import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hpcpar.comm.failure import publish_once
from hpcpar.comm.inquiry import process_fields
from hpcpar.config.run_folder import RunFolder
from hpcpar.config.surroundings import process_table
from hpcpar.errors import UserError

LOOK_S = 2.0  # so often a run touches its claim, and the witnesses of several ranks write as often
QUIET_S = 6.0  # without a sign from a run on another host: it is gone
LONGEST_S = 60.0  # that the last ranks of a job which is being ended may go on


@contextmanager
def claimed(folder: RunFolder, host: str, look_s: float = LOOK_S) -> Iterator[None]:
    """Hold a run folder for this process; one process of a run calls. Raises: UserError if another run works there.

    Cost: nothing, or QUIET_S where a run of another process table has left the folder without an end.
    """
    mine = {"host": host, "pid": os.getpid(), "began": _began(os.getpid()), "table": process_table()}
    while not publish_once(folder.running, json.dumps(mine)):
        found = _claim(folder.running)
        refuse_if_running(folder, look_s)
        if _claim(folder.running) == found:
            _take_away(folder, found)
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(folder.running, mine, ended, look_s), name="claim", daemon=True)
    beats.start()
    try:
        yield
    finally:
        ended.set()
        beats.join()
        with suppress(OSError):  # one that stays does no harm, and the run has ended as it has
            if _claim(folder.running) == mine:
                folder.running.unlink()


def refuse_if_running(folder: RunFolder, look_s: float = LOOK_S) -> None:
    """Raise UserError if a run is at work in a folder; of another process table it shows by what it writes."""
    found = _claim(folder.running)
    if found is None:
        return
    here = found["table"] == process_table()
    if _began(found["pid"]) == found["began"] if here else _writes(folder, found, look_s):
        raise UserError(str(folder.path), f"another run is at work in it: process {found['pid']} on {found['host']}",
                        f"wait for it, let it save and stop (touch {shlex.quote(str(folder.stop))}), or choose another "
                        "--run folder")


def _beat(path: Path, mine: dict[str, Any], ended: threading.Event, look_s: float) -> None:
    """Touch one's own claim till the end, so that other hosts see it alive however long a step takes."""
    while not ended.wait(look_s):
        with suppress(OSError):  # a file system that fails is told by what needs it
            if _claim(path) != mine:
                return  # deleted, or of a start that took this run for dead while its machine stood still
            os.utime(path)


def _claim(path: Path) -> dict[str, Any] | None:
    """Return who holds a folder; None where nobody does, as far as one can read. Raises: OSError."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() == {"host", "pid", "began", "table"} else None


def _take_away(folder: RunFolder, dead: dict[str, Any] | None) -> None:
    """Remove what a dead run has left, and nothing else: another start may have done so in this very moment."""
    aside = folder.running.with_name(f".RUNNING.{os.uname().nodename}.{os.getpid()}.aside")
    with suppress(FileNotFoundError):
        folder.running.rename(aside)
        if _claim(aside) != dead:
            publish_once(folder.running, aside.read_text())
        aside.unlink()


def _began(pid: int) -> int | None:
    """Return when a process of this host began, in the kernel's ticks, for numbers come again; None: it has ended."""
    fields = process_fields(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def _writes(folder: RunFolder, found: dict[str, Any], look_s: float) -> bool:
    """Whether a run goes on writing in its folder: one that is ended falls silent soon."""
    last, quiet_s, passed_s = _written(folder), 0.0, 0.0
    while quiet_s < QUIET_S / LOOK_S * look_s:
        if passed_s >= LONGEST_S / LOOK_S * look_s:
            return True
        time.sleep(look_s)
        if _claim(folder.running) != found:
            return False  # it has ended, or another start has the folder: who asks looks again
        now = _written(folder)
        quiet_s, passed_s, last = 0.0 if now != last else quiet_s + look_s, passed_s + look_s, now
    return False


def _written(folder: RunFolder) -> list[int]:
    found = []
    for path in (folder.running, folder.metrics, *sorted(folder.watch.glob("beat-*"))):
        with suppress(OSError), path.open("rb") as file:  # opened: then NFS asks the server, not what it remembers
            found.append(os.fstat(file.fileno()).st_mtime_ns)
    return found
