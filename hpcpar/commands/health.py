"""Commands that look after runs and machines: status, stacks, doctor."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpcpar.commands.command import Command, Words
from hpcpar.config.run_folder import RunFolder
from hpcpar.config.surroundings import Surroundings
from hpcpar.errors import UserError

if TYPE_CHECKING:
    from hpcpar.comm.verdict import Testimony

WATCH_S = 2.0
# a look reads all steps' lines and asks about every rank's file: at most a twentieth of a login node's core
_CALM = 20


def commands() -> list[Command]:
    """List this module's commands."""
    run = ("run", {"type": Path, "help": "a run folder"})
    return [
        Command("status", "how a run is getting on (without RUN: all under runs/)", _status, [
            ("run", {"type": Path, "nargs": "?", "help": "a run folder"}),
            ("--watch", {"action": "store_true", "help": "keep showing it until it ends"}),
        ]),
        Command("stacks", "what every rank of a living run is doing, equal stacks together", _stacks, [run]),
        Command("doctor", "check this machine; under mpirun or srun, also the ranks and what lies between them",
                _doctor, [("node", {"nargs": "?", "choices": ("node",), "help":
                                    "the word node: measure all hosts, under mpirun or srun"})]),
    ]


def _status(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.submit.status import describe, read_status

    if args.run is None:
        folders = sorted(path.parent for path in Path("runs").glob("*/config.toml"))
        if not folders:
            raise UserError("runs/", "holds no run", "give the folder of one: hpcpar status RUN")
        for folder in folders:
            one = read_status(folder)
            loss = "-" if one.loss is None else f"{one.loss:.4f}"
            print(f"{one.path!s:<32} {one.state:<12} step {one.step}/{one.steps}  loss {loss}")
        return 0
    if args.watch:
        _watch(args.run)
        return 0
    status = read_status(args.run)
    print(describe(status))
    return 3 if status.mfu is not None and status.mfu > 1 else 0


def _watch(path: Path) -> None:
    from rich.live import Live
    from rich.table import Table

    from hpcpar.submit.status import read_status, rows

    with Live(auto_refresh=False) as live:
        while True:
            start = time.perf_counter()
            status = read_status(path)
            took_s = time.perf_counter() - start
            table = Table(title=str(path), show_header=False)
            for name, value in rows(status):
                table.add_row(name, value)
            live.update(table, refresh=True)
            if status.state != "running":
                return
            time.sleep(max(WATCH_S, _CALM * took_s))


def _stacks(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.comm.inquiry import await_answers

    folder = RunFolder(args.run)
    if not folder.hosts.exists():
        raise UserError(str(args.run), "is no run of several ranks that was started",
                        "give the folder of one; a single process writes its stacks after kill -QUIT")
    hosts = json.loads(folder.hosts.read_text())
    name = f"{surroundings.host}-command-{os.getpid()}"
    (folder.watch / f"ask-{name}").touch()
    told, silent = await_answers(folder.watch, name, list(hosts))
    print(group_stacks(told))
    for host in silent:
        print(f"{host} gave no answer: has the run ended? (ranks {', '.join(map(str, hosts[host]))})")
    return 3 if silent else 0


def group_stacks(told: Sequence[Testimony]) -> str:
    """Return the ranks' stacks, equal ones together, the smallest group first: the odd one out is on top."""
    groups: dict[tuple[str, ...], list[Testimony]] = {}
    for one in told:
        groups.setdefault(one.stack or (f"({one.manner}: no stack)",), []).append(one)
    blocks = []
    for stack, ones in sorted(groups.items(), key=lambda item: len(item[1])):
        where = sorted({f"step {one.step}, {one.phase}, {one.action or '-'}, {one.manner}" for one in ones})
        longest = max(one.quiet_s for one in ones)
        blocks.append("\n".join([
            f"{len(ones)} rank{'s' * (len(ones) > 1)} ({', '.join(map(str, sorted(one.rank for one in ones)))}); "
            f"quiet for up to {longest:.0f} s; {'; '.join(where[:3])}{' ...' if len(where) > 3 else ''}",
            *(f"  {line}" for line in stack)]))
    return "\n\n".join(blocks)


def _doctor(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.doctor import examine

    if args.node and not surroundings.launcher:
        raise UserError("doctor node", "compares hosts, but this is one process",
                        "srun --mpi=pmi2 --ntasks-per-node 1 hpcpar doctor node")
    return examine(surroundings, bool(args.node))
