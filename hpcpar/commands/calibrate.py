"""The command that measures this machine, for the planner."""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
from pathlib import Path

from hpcpar.commands.command import Command, Words
from hpcpar.config.surroundings import Surroundings
from hpcpar.errors import UserError
from hpcpar.planner.hardware import load_machine

BUSY = 0.5  # relative error of a product, from which on no constants describe what was measured


def commands() -> list[Command]:
    """List this module's commands."""
    return [Command("calibrate", "measure this machine for a minute, and write a machine TOML for the planner; "
                                 "under mpirun -n N its links too", _calibrate, [
        ("out", {"type": Path, "help": "the TOML to write, such as machine.toml"}),
    ])]


def _calibrate(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    path: Path = args.out
    if path.suffix != ".toml":
        raise UserError("out", f"{path} does not end in .toml, by which [machine] gpu knows a path",
                        f"write {path.with_suffix('.toml')}")
    if not path.parent.is_dir():
        raise UserError("out", f"{path.parent} is no folder", f"mkdir -p {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK) or path.is_dir():
        raise UserError("out", f"{path} cannot be written", "give a file in a folder of yours")
    if path.exists():
        try:
            load_machine(str(path))
        except UserError:
            raise UserError("out", f"{path} is there, and is no machine TOML", "give another name: it would be "
                            "overwritten") from None

    from hpcpar.comm.bootstrap import close_process_group, connect, open_process_group
    from hpcpar.planner.calibration import fit, worst_product
    from hpcpar.planner.hardware import machine_toml
    from hpcpar.train.calibrate import measure

    world = connect(surroundings)
    open_process_group(world)

    def say(text: str) -> None:
        if world.rank == 0:
            print(text, flush=True)

    measured = measure(world, say)
    if world.rank == 0:
        shared = f" on {measured.cores} cores" if measured.cores else ""
        machine = fit(measured, [
            f"hpcpar calibrate, {datetime.date.today()}, {surroundings.host}: {measured.device}, "
            f"{measured.ranks_per_node} ranks a node{shared}"])
        path.write_text(machine_toml(machine), encoding="utf-8")
        worst = worst_product(machine, measured)
        print(f"worst of {len(measured.products)} products {worst:.0%} off"
              + (": something else runs here; calibrate again when the machine is quiet" if worst > BUSY else ""))
        print(f"wrote {path}; next: hpcpar plan JOB --machine.gpu {shlex.quote(str(path))}")
    close_process_group()
    world.control.barrier()
    return 0
