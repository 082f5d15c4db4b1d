"""When a run saves its sets, and what became of them: a save that fails is told and counted, and training goes on."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hpcpar.checkpoint.background import BackgroundSaver
from hpcpar.checkpoint.memory import Memory, check_room, forget
from hpcpar.checkpoint.save import Published, save_now
from hpcpar.checkpoint.store import hdf5_plugin
from hpcpar.checkpoint.tasks import Saving, Tasks
from hpcpar.checkpoint.writer import staged
from hpcpar.comm.bootstrap import World
from hpcpar.errors import CheckpointError
from hpcpar.train.metrics import Metrics
from hpcpar.train.rhythm import Rhythm
from hpcpar.train.state import Progress
from hpcpar.train.step import Trainee
from hpcpar.units import format_bytes, format_seconds


class Saves:
    """A run's saves. Every rank must call each method, but for `writing`, after the same step."""

    def __init__(self, trainee: Trainee, world: World, checkpoints: Path, data: str, saved_step: int,
                 metrics: Metrics | None, memory: Memory | None = None):
        """Spawn the writer, where one is wanted. `data` is the fingerprint of the text; only rank 0 has `metrics`.

        Copies are kept in `memory`, where there is one.
        """
        self._job, self._trainee, self._world = trainee.layout.job, trainee, world
        self._data, self._metrics, self._memory = data, metrics, memory
        self.saved_step = saved_step
        wish = self._job.checkpoint
        saving = Saving(checkpoints, trainee.layout, wish.ranks_per_file, wish.keep, wish.keep_every, wish.compression)
        self._tasks = Tasks(saving, world.rank, {})  # of the saves that the ranks do themselves
        if wish.compression != "none":
            hdf5_plugin()  # now, not at the first save
        self._rhythm: Rhythm | None = None
        if wish.every == "auto":
            num_nodes = len(set(world.control.all_gather(world.host)))
            self._rhythm = Rhythm(max(saved_step, 0), self._job.machine.mtbf_h * 3600 / num_nodes)
        self._background: BackgroundSaver | None = None
        if wish.asynchronous and wish.every:
            kinds = {kind: str(shards[0].dtype).removeprefix("torch.")
                     for kind, shards in trainee.optimizer.shards().items()}
            if memory is not None:
                check_room(memory, world.control, staged(None, trainee.layout, world.rank, kinds)[0])
            self._background = BackgroundSaver(saving, world.control, kinds, memory, self._say)
        # of the save in hand: its step, when it was due, how long the loop has stood still for it, how long it took
        self._step, self._due_at, self._stall_s, self._save_s = -1, 0.0, 0.0, 0.0

    @property
    def writing(self) -> bool:
        """Whether this rank's writer is at work."""
        return self._background is not None and self._background.busy

    def due(self, step: int) -> bool:
        """Whether a set should be saved after this step."""
        if self._rhythm is not None:
            return step >= self._rhythm.next_step and not self._in_hand
        every = self._job.checkpoint.every
        return isinstance(every, int) and every > 0 and step % every == 0

    def after_step(self, step_s: float, num_writing: int) -> None:
        """Take the save in hand further, if the step's all-reduce has found no rank whose writer is at work."""
        if self._rhythm is not None:
            self._rhythm.step(step_s, self._in_hand)
        if self._background is not None and self._in_hand and num_writing == 0:
            self._attempt(self._background.advance)

    def save(self, progress: Progress) -> None:
        """Save the current step; if asynchronously, this waits for the last save and for a copy in memory."""
        start = time.perf_counter()
        self.finish()
        self._step, self._due_at, self._stall_s = progress.step, start, 0.0
        background = self._background
        if background is None:
            self._attempt(lambda: self._save_now(progress))
            return
        for kind, shards in self._trainee.optimizer.shards().items():
            for copy, shard in zip(background.shards[kind], shards, strict=True):
                torch.from_numpy(copy).copy_(shard)
        self._attempt(lambda: background.start(progress.step, self._state(progress)))
        self._stall_s = time.perf_counter() - start

    def finish(self) -> None:
        """Wait for the save in hand, if there is one."""
        if self._background is not None:
            self._attempt(self._background.finish)

    def last(self, progress: Progress) -> None:
        """Save the run's last step, unless that is done. Raises: CheckpointError; nobody could go on from that step."""
        self.finish()
        if self.saved_step != progress.step:
            self._step, self._due_at = progress.step, time.perf_counter()
            self._tell(self._save_now(progress))
        if self._background is not None:
            self._background.close()
        if self._memory is not None:
            forget(self._memory)

    @property
    def _in_hand(self) -> bool:
        return self._background is not None and self._background.active

    def _save_now(self, progress: Progress) -> Published:
        self._tasks.shards = {kind: [shard.cpu().numpy() for shard in tensors]
                              for kind, tensors in self._trainee.optimizer.shards().items()}
        try:
            published = save_now(self._tasks, progress.step, self._world.control, self._state(progress))
        finally:
            self._tasks.shards = {}  # from a GPU they are copies
        self._stall_s = time.perf_counter() - self._due_at
        return published

    def _state(self, progress: Progress) -> dict[str, object]:
        return {"progress": progress.as_dict(), "job": dataclasses.asdict(self._job), "data": self._data}

    def _attempt(self, work: Callable[[], Published | None]) -> None:
        """Do a part of a save; its failure is no reason to lose the run."""
        try:
            published = work()
        except CheckpointError as error:
            self._say(f"{error}; training goes on")
            if self._metrics is not None:
                self._metrics.save_failed(self._step, str(error))
            if self._rhythm is not None:
                self._rhythm.wait(self._step)
            return
        if published is not None:
            self._tell(published)
            if self._rhythm is not None:
                self._keep_time(self._rhythm)

    def _tell(self, published: Published) -> None:
        self.saved_step, self._save_s = self._step, time.perf_counter() - self._due_at
        self._say(f"saved {published.path.name}: {format_bytes(published.num_bytes)} in "
                  f"{format_seconds(self._save_s)}, stall {format_seconds(self._stall_s)}")
        if self._metrics is not None:
            self._metrics.saved(self._step, published.num_bytes, self._save_s, self._stall_s)

    def _keep_time(self, rhythm: Rhythm) -> None:
        """Set when the next save is due; rank 0's clock decides for all."""
        cost_s = rhythm.cost_s(self._stall_s)
        every = self._world.control.broadcast(rhythm.steps_between(self._stall_s, self._save_s))
        rhythm.wait(self._step, every)
        self._say(f"a save costs {format_seconds(cost_s)}: the next one is {every} steps after this one")

    def _say(self, text: str) -> None:
        logging.info(text)
        if self._metrics is not None:
            self._metrics.say(text)
