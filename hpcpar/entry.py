"""The door by its module name, for launchers: `python -m hpcpar.entry train JOB ...` is `hpcpar train JOB ...`.

It runs the `hpcpar` that PYTHONPATH finds first (a run folder's snapshot); the installed command need not be on PATH.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line of this process."""
    from hpcpar import cli

    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
