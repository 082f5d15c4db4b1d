"""A light task, one a node: computes its ranks' places from the layout, and agrees with every node it would talk to.

    srun --ntasks-per-node=1 python node_check.py RUN
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import cache
from pathlib import Path

from hpcpar.config.load import load_job
from hpcpar.layout.layout import Layout
from hpcpar.layout.mesh import AXES

TIMEOUT_S = 240


def main(run: Path, node: int) -> None:
    """Tell where this node's ranks are; wait for those they talk to, and compare."""
    job = load_job(run / "submit/job.toml")
    layout, a_node = Layout(job), job.machine.gpus_per_node
    mine = {rank: {"at": layout.mesh.coordinates(rank), **{axis: layout.mesh.group(axis, rank) for axis in AXES}}
            for rank in range(node * a_node, (node + 1) * a_node)}
    told = run / "nodes"
    told.mkdir(exist_ok=True)
    (told / f".{node}").write_text(json.dumps(mine))
    (told / f".{node}").rename(told / f"{node}.json")
    compared = 0

    @cache
    def of_node(other: int) -> dict:
        return wait_for(told / f"{other}.json")

    for rank, places in mine.items():
        assert {member // a_node for member in places["tp"]} == {node}, "tp leaves the node"
        for axis in AXES:
            assert rank in places[axis]
            for member in places[axis]:
                theirs = of_node(member // a_node)[str(member)]
                assert tuple(theirs[axis]) == places[axis], (rank, member, axis)
                assert all(theirs["at"][i] == places["at"][i] for i in range(4) if AXES[i] != axis)
                compared += 1
    (told / f"{node}.agreed").write_text(str(compared))


def wait_for(path: Path) -> dict:
    """Read what another node has told."""
    end = time.monotonic() + TIMEOUT_S
    while not path.exists():
        if time.monotonic() > end:
            raise SystemExit(f"{path} did not come")
        time.sleep(0.2)
    return json.loads(path.read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["SLURM_NODEID"]))
