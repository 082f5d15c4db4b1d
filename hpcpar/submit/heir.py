"""What another node does where the first node of a Slurm job is lost, with batch script, srun and rank 0.

    python -m hpcpar.submit.heir RUN      in a task's environment; its rank or witness calls it before the ranks end

Slurm notices the loss after its SlurmdTimeout and requeues, but with the lost node and as many tasks as before: an
elastic job would wait for it. Does nothing where srun answers, and where no batch script of ours has started the ranks.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from hpcpar.submit import ask
from hpcpar.submit.batch import Batch
from hpcpar.submit.requeue import follow_up

CONNECT_S = 5.0  # within which srun's host answers a connection, if it lives
WRITES_ITS_END_S = 5.0  # in which a batch script that lives has told its end
DONE_S = 15.0  # within which a node has done what the lost batch script would have
MISSED = ("DOWN", "NOT_RESPONDING", "*")


class Heir:
    """One node that may have to act for the batch script."""

    def __init__(self, run: Path, environment: Mapping[str, str]):
        self.batch, self.environment = Batch(run, environment), environment
        self.starts = self.batch.starts

    def inherit(self) -> None:
        """Do what the batch script would have done, if it is lost.

        All nodes ask: the first does it. The others wait until it has, since what they end may end it as well.
        """
        if not self._is_lost():
            return
        mark = self.starts.heir
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            end = time.monotonic() + DONE_S
            while not mark.read_text() and time.monotonic() < end:
                time.sleep(0.2)
            return
        does = self._act()
        self.starts.note(job=self.batch.job_id, heir=self.environment.get("SLURMD_NODENAME", ""), does=does)
        mark.write_text(does)

    def _act(self) -> str:
        batch = self.batch
        batch.remember({batch.nodes[0]: "lost, and the batch script with it"})
        if batch.requeue():
            return "requeued"
        if not self.starts.job.exists():
            return "requeue refused"  # and train.sbatch got words that nobody has kept
        return follow_up(self.environment, self.starts, (), keep_nodes=batch.elastic())

    def _is_lost(self) -> bool:
        """Return whether the batch script is lost, and the run is to go on."""
        if self._has_ended() or not self._srun_is_gone():
            return False
        if not self._is_missed():
            time.sleep(WRITES_ITS_END_S)  # it may be srun alone that is gone
            if self._has_ended() or not self._srun_is_gone() or not (self._is_missed() or self._state() == "RUNNING"):
                return False
        return not self.starts.folder.stop.exists() and self.starts.fruitless() <= self.batch.job().submit.retries

    def _has_ended(self) -> bool:
        """Return whether the batch script that started these ranks, if there is one, has told its end."""
        newest = self.starts.lines()[-1:]
        return not newest or "nodes" not in newest[0] or newest[0]["job"] != self.batch.job_id

    def _srun_is_gone(self) -> bool:
        """Return whether the srun that started this task, which takes connections to its end, takes none any more."""
        try:
            address = self.environment["SLURM_SRUN_COMM_HOST"], int(self.environment["SLURM_SRUN_COMM_PORT"])
            socket.create_connection(address, CONNECT_S).close()
        except (ConnectionRefusedError, TimeoutError):
            return True
        except OSError as error:
            return error.errno == errno.EHOSTUNREACH
        except KeyError:  # not told where it is
            return False
        return False

    def _is_missed(self) -> bool:
        """Return whether Slurm has ended this start since it misses the first node."""
        first = self.batch.nodes[0]
        why = ask.lost_nodes([first], self.starts.began()).get(first, "")
        return self._state() != "RUNNING" and any(word in why for word in MISSED)

    def _state(self) -> str:
        return ask.job_fields(self.batch.own_id).get("JobState", "")


if __name__ == "__main__":
    Heir(Path(sys.argv[1]), os.environ).inherit()
