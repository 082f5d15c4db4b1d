"""`hpcpar train` whose ranks believe to be on a host each: python remembering_ranks.py MEMORY RANK STEP train JOB ...

RANK is killed with -9 when the set of STEP is whole in memory and nothing of it is on disk yet; RANK -1: nobody is.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpcpar import cli
from hpcpar.checkpoint import background
from hpcpar.checkpoint.memory import Memory, open_memory
from hpcpar.comm.control import Control
from hpcpar.train import loop

SHARED, VICTIM, STEP = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])


def on_hosts_of_their_own(checkpoints: Path, control: Control, host: str) -> Memory:
    return open_memory(checkpoints, control, f"node{control.rank}", SHARED)


def killed(saving: Any, step: int, state: Any, control: Control, worker: Any) -> Iterator[Any]:
    if (control.rank, step) == (VICTIM, STEP):
        os.kill(os.getpid(), signal.SIGKILL)
    return save_phases(saving, step, state, control, worker)


save_phases = background.save_phases
background.save_phases, loop.open_memory = killed, on_hosts_of_their_own
sys.exit(cli.main(sys.argv[4:]))
