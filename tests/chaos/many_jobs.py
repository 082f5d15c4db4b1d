"""Many jobs at once on one machine: each opens its ranks' groups and sums over them; no port is asked for, none clash.

    python -m tests.chaos.many_jobs 20      (make many-jobs; a sample is in the suite)
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RANKS = 2
# All jobs wait for one file before they open their stores: in the same moment, not one after another
RANK = """
import os, sys, time, pathlib
import torch, torch.distributed as dist
from hpcpar.comm.bootstrap import connect, open_process_group
from hpcpar.config.surroundings import Surroundings
place, job = pathlib.Path(sys.argv[1]), int(sys.argv[2])
world = connect(Surroundings.read(os.environ))
(place / f"ready-{job}-{world.rank}").touch()
while not (place / "go").exists():
    time.sleep(0.001)
for _ in range(3):
    open_process_group(world)
    total = torch.full((1000,), float(job))
    dist.all_reduce(total)
    assert (total == job * world.size).all(), total
    world.control.barrier()
    dist.destroy_process_group()
    world.control.barrier()
"""


def run_together(num_jobs: int, limit_s: float) -> float:
    """Run jobs side by side; return the seconds from `go` to the last one's end. Raises: AssertionError."""
    with tempfile.TemporaryDirectory() as name:
        place, jobs = Path(name), []
        try:
            for job in range(num_jobs):
                with (place / f"log-{job}").open("w") as log:
                    command = ["mpirun", "-n", str(RANKS), sys.executable, "-c", RANK, name, str(job)]
                    jobs.append(subprocess.Popen(command, stdout=log, stderr=log,
                                                 env={**os.environ, "OMP_NUM_THREADS": "1"}))
            end = time.monotonic() + limit_s
            while len(list(place.glob("ready-*"))) < num_jobs * RANKS:
                assert time.monotonic() < end and not any(job.poll() for job in jobs), logs(place)
                time.sleep(0.1)
            start = time.monotonic()
            (place / "go").touch()
            assert [job.wait(max(1.0, end - time.monotonic())) for job in jobs] == [0] * num_jobs, logs(place)
            return time.monotonic() - start
        finally:
            for job in jobs:
                if job.poll() is None:
                    job.kill()


def logs(place: Path) -> str:
    """Return what the jobs have printed."""
    return "\n".join(path.read_text() for path in place.glob("log-*"))


if __name__ == "__main__":
    count = int(sys.argv[1])
    print(f"{count} jobs x {RANKS} ranks at once, 3 process groups each: all right, "
          f"{run_together(count, 500):.1f} s from the common start to the last end")
