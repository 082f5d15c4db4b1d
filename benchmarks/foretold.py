"""The demo's steps as the planner foretells them for this machine, beside the measured ones, at several layouts.

    python benchmarks/foretold.py machine.toml             # what `mpirun -n 8 hpcpar calibrate machine.toml` wrote
    python benchmarks/foretold.py machine.toml "tp 2"      # only the layouts whose names begin so

Prints what `hpcpar train` says at its end, as a table. Needs the demo's token store (`make demo`).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

JOB = Path(__file__).parent.parent / "jobs/demo.toml"
STEPS = 14
LAYOUTS = {
    "tp 2 x pp 2 x dp 2": "", "dp 8": "--layout.tp 1 --layout.pp 1 --train.microbatch 2",
    "tp 8": "--layout.tp 8 --layout.pp 1", "pp 8": "--layout.tp 1 --layout.pp 8 --train.microbatch 2",
    "tp 4 x dp 2": "--layout.tp 4 --layout.pp 1", "pp 4 x dp 2": "--layout.tp 1 --layout.pp 4 --train.microbatch 2",
    "tp 2 x pp 4": "--layout.tp 2 --layout.pp 4", "tp 1 x pp 2 x dp 4": "--layout.tp 1 --train.microbatch 2",
}
SAID = re.compile(
    r"a step: (.*) measured, (.*) foretold \((.*)\); the fullest rank: (.*) measured, (.*) foretold;")


def main() -> int:
    """Train a few steps at each layout."""
    machine, wanted = sys.argv[1], (sys.argv[2:] or [""])[0]
    print("| layout | step measured | foretold | error | memory measured | foretold |\n|---|---|---|---|---|---|")
    for name, words in LAYOUTS.items():
        if not name.startswith(wanted):
            continue
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                ["mpirun", "-n", "8", "hpcpar", "train", str(JOB), "--run", f"{folder}/run", "--machine.gpu", machine,
                 "--train.steps", str(STEPS), "--checkpoint.every", "0", "--data.validate_every", "0", *words.split()],
                capture_output=True, text=True, check=True)
        found = SAID.search(done.stdout)
        assert found, done.stdout
        print("| " + " | ".join((name, *found.groups())) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
