"""A run's curves for TensorBoard."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class Curves:
    """An event file in TensorBoard's folder of a run; what older files say of `step` and later is void.

    Written by the caller's thread: torch's SummaryWriter has a thread of its own, which wants the interpreter while the
    next step is computed.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._torn = False
        self._file = (folder / name).open("ab")
        self._records = RecordWriter(self._file)
        self._write(step=step, file_version="brain.Event:2")
        self._write(step=step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, **values: float) -> None:
        """Add a point to each curve that is named."""
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=Summary(value=points))

    def close(self) -> None:
        """Write what is buffered."""
        with suppress(OSError):
            self._file.close()

    def _write(self, **what: Any) -> None:
        if self._torn:
            return
        try:
            self._records.write(Event(wall_time=time.time(), **what).SerializeToString())
            self._file.flush()
        except OSError:  # a full disk; nobody could read past half a record, and metrics.jsonl has it all
            self._torn = True
