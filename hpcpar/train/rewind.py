"""Going back on purpose: `hpcpar train --rewind-to STEP --skip-samples A:B`."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from hpcpar.checkpoint import verify
from hpcpar.checkpoint.verify import published_sets
from hpcpar.config.run_folder import RunFolder
from hpcpar.errors import UserError
from hpcpar.train.state import Progress


def parse_samples(text: str) -> tuple[int, int]:
    """Read A:B, sample numbers from A up to but without B."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise UserError("--skip-samples", f"{text} is no range of sample numbers",
                        "write A:B with A < B; metrics.jsonl has each step's first_sample")
    return int(first), int(last)


def rewind(folder: RunFolder, to: int | None, skip: str | None) -> str:
    """Make the set of step `to` the newest, note what is to be left out, and say what was done; one process calls.

    Later sets and the metrics so far are moved aside, not deleted. A requeue repeats the command line, so a request
    equal to the last one that was carried out is not carried out again.
    """
    request = {"to": to, "skip": list(parse_samples(skip)) if skip else None}
    done = _done(folder)
    if done and done[-1] == request:
        return "--rewind-to and --skip-samples were obeyed before; going on (a line in rewinds.jsonl says so)"
    if to is not None:
        _move_aside(folder, to)
    with folder.rewinds.open("a") as file:
        file.write(json.dumps(request) + "\n")
    return (f"rewound to step {to}" if to is not None else "") + (f"; samples {skip} are left out" if skip else "")


def leave_out(folder: RunFolder, progress: Progress) -> None:
    """Add what was requested to what a run leaves out. Raises: UserError for samples that were trained on already."""
    for request in _done(folder):
        if request["skip"] is None or _covered(request["skip"], progress):
            continue
        start, stop = request["skip"]
        reached = int(progress.sample_numbers(np.array(progress.samples)))
        if start < reached:
            raise UserError("--skip-samples", f"starts at {start}, but samples up to {reached} were trained on already",
                            f"rewind to before them with --rewind-to, or start at {reached}")
        progress.leave_out(start, stop)


def _covered(wanted: list[int], progress: Progress) -> bool:
    return any(low <= wanted[0] and wanted[1] <= high for low, high in progress.left_out)


def _done(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.rewinds.read_text().splitlines()] if folder.rewinds.exists() else []


def _move_aside(folder: RunFolder, to: int) -> None:
    sets = {int(path.name.partition("-")[2]): path for path in published_sets(folder.checkpoints)}
    if to not in sets:
        known = ", ".join(map(str, sets)) or "none"
        raise UserError("--rewind-to", f"there is no published set of step {to}", f"there are: {known}")
    number = 1
    while (aside := folder.path / f"metrics-rewound-{number}.jsonl").exists():
        number += 1
    if folder.metrics.exists():
        aside.write_bytes(folder.metrics.read_bytes())
    verify.rewind(folder.checkpoints, sets[to])
