"""`make parity-all`: the full product of parity jobs under `mpirun -n 8`, 20 steps each.

With N, a random sample of N of them; with `pairs`, the rows of the suite, which cover all pairs.
"""

from __future__ import annotations

import os
import random
import sys
import time

from hpcpar.comm.bootstrap import connect, open_process_group
from hpcpar.config.surroundings import Surroundings
from hpcpar.train.parity import compare
from tests.parity.jobs import all_pairs, full_product, job_of, legal, name_of, random_tokens


def main() -> int:
    """Compare every job, print what differs and a summary; return 1 if anything differs."""
    world = connect(Surroundings.read(os.environ))
    open_process_group(world)
    wish = sys.argv[1] if len(sys.argv) > 1 else ""
    choices = all_pairs() if wish == "pairs" else [choice for choice in full_product(world.size) if legal(choice)]
    if wish.isdigit():
        choices = random.Random(0).sample(choices, min(int(wish), len(choices)))
    bad, worst, start = 0, 0.0, time.monotonic()
    for number, choice in enumerate(choices, 1):
        found = compare(job_of(choice), world, random_tokens(choice["vocab"], 8), 20, 1e-10)
        bad += bool(found.first)
        worst = max(worst, found.loss, found.grad_norm, found.grads, found.weights)
        if world.rank == 0:
            if found.first:
                print(f"{name_of(choice)}: {found.first}", flush=True)
            if number % 20 == 0 or number == len(choices):
                print(f"{number}/{len(choices)} jobs, {bad} differ, largest difference {worst:.1e}, "
                      f"{time.monotonic() - start:.0f} s", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
