"""The writer: a child process beside a rank that writes what the rank has put into shared memory.

    rank    copy -> [ shared memory ]        {"task": "write", ...}\\n --stdin-->   writer
    train on        [ shared memory ] --read-- hash, write, sync     <--stdout-- {"done": ...}\\n

Spawned, never forked: it knows nothing of MPI, CUDA or torch. It ends with its parent, whatever ends that.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpcpar.checkpoint.tasks import Saving, Tasks
from hpcpar.config.load import job_from_tables, to_toml
from hpcpar.layout.layout import Layout

Array = np.ndarray[Any, Any]
# the ranks go first; the kernel derives the priority of reads and writes from it
NICE = 10
# an answer is one write to a pipe, so that the reader never sees half of it
LONGEST_REASON = 2000
_ALIGNMENT = 64
_PR_SET_PDEATHSIG = 1


def staged(memory: mmap.mmap | None, layout: Layout, global_rank: int,
           kinds: Mapping[str, str]) -> tuple[int, dict[str, list[Array]]]:
    """Return the bytes that a rank's shards take, and (if there is memory) the shards as views of it.

    `kinds` gives each kind's dtype; shards[kind][bucket] is flat, as `save_set` wants them.
    """
    at = layout.mesh.coordinates(global_rank)
    sizes = [bucket.numel // layout.num_shards for bucket in layout.buckets(at.pp_rank, at.tp_rank)]
    shards: dict[str, list[Array]] = {kind: [] for kind in kinds}
    start = 0
    for kind, dtype in kinds.items():
        for size in sizes:
            if memory is not None:
                shards[kind].append(np.frombuffer(memory, dtype, size, start))
            start += -(-size * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
    return start, shards


def charge(saving: Saving, global_rank: int, kinds: Mapping[str, str], memory_fd: int) -> str:
    """Return the first line that a writer is told, as JSON."""
    checkpoints, layout, *rest = saving
    return json.dumps({"parent": os.getpid(), "memory_fd": memory_fd, "rank": global_rank, "kinds": dict(kinds),
                       "checkpoints": str(checkpoints), "job": to_toml(layout.job), "rest": rest})


def _tasks(told: Mapping[str, Any]) -> Tasks:
    layout = Layout(job_from_tables(tomllib.loads(told["job"])))
    saving = Saving(Path(told["checkpoints"]), layout, *told["rest"])
    memory = mmap.mmap(told["memory_fd"], 0, prot=mmap.PROT_READ)
    return Tasks(saving, told["rank"], staged(memory, layout, told["rank"], told["kinds"])[1])


def _end_with(parent: int) -> None:
    """Let the kernel kill this process when its parent dies, in the midst of a write too."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before that
        raise SystemExit(1)


def main() -> None:
    """Do the tasks that stdin tells, one a line, until it ends."""
    os.nice(NICE)
    first = sys.stdin.readline()
    if not first:
        return
    told = json.loads(first)
    _end_with(told["parent"])
    tasks = _tasks(told)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"done": getattr(tasks, asked.pop("task"))(**asked)}
        except Exception as error:  # whatever it is: the rank reports it and trains on
            answer = {"failed": f"{type(error).__name__}: {error}"[:LONGEST_REASON]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
