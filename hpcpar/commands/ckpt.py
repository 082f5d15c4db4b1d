"""Commands about checkpoint sets: what is there, whether it is whole, what may read it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hpcpar.commands.command import Command, Words, job_argument, whole_job
from hpcpar.config.run_folder import RunFolder
from hpcpar.config.surroundings import Surroundings
from hpcpar.errors import CheckpointError, UserError
from hpcpar.units import format_bytes

if TYPE_CHECKING:
    from hpcpar.checkpoint.verify import Damage

SHOWN = 20  # differences printed; the rest is counted


def commands() -> list[Command]:
    """List this module's commands."""
    run = ("run", {"type": Path, "metavar": "RUN", "help": "a run folder"})
    chosen = ("set", {"type": Path, "metavar": "SET", "help": "a set's folder, or a run folder for its newest set"})
    return [
        Command("ckpt ls", "list a run's sets", _ls, [run]),
        Command("ckpt show", "draw a set: tensors, files, who wrote what", _show, [
            chosen, ("tensor", {"nargs": "?", "metavar": "TENSOR", "help": "draw this tensor's boxes"})]),
        Command("ckpt verify", "recompute the checksums of a set, or of all sets of a run", _verify, [
            ("path", {"type": Path, "metavar": "SET|RUN", "help": "a set's folder or a run folder"})]),
        Command("ckpt check", "say whether a job can go on from a run: what changes, and why it may or not", _check,
                [job_argument(), run], overrides=True),
        Command("ckpt diff", "name the first tensor in which two sets differ, and by how much", _diff, [
            ("first", {"type": Path, "metavar": "A"}), ("second", {"type": Path, "metavar": "B"})]),
        Command("ckpt rewind", "make an older set the newest: verify it and move later sets aside", _rewind, [
            run, ("set", {"metavar": "SET", "help": "such as step-00000100"})]),
        Command("ckpt prune", "delete old sets, never the newest that is whole", _prune, [
            run, ("keep", {"type": int, "metavar": "KEEP", "help": "newest sets to keep"})]),
    ]


def _ls(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.checkpoint.describe import list_sets

    for line in list_sets(_checkpoints(args.run)):
        print(line)
    return 0


def _show(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.checkpoint.describe import describe_set, describe_tensor

    path = _set(args.set)
    for line in describe_tensor(path, args.tensor) if args.tensor else describe_set(path):
        print(line)
    return 0


def _verify(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.checkpoint.describe import grouped
    from hpcpar.checkpoint.verify import named_sets

    sets = [args.path] if _is_set(args.path) else named_sets(_checkpoints(args.path))
    bad = []
    for path in sets:
        try:
            size, damage = _verify_one(path)
        except CheckpointError as error:
            print(f"{path.name}: DAMAGED: {error}")
            bad.append(f"{path.name} ({error})")
            continue
        print(f"{path.name}: {f'DAMAGED: {len(damage)} files' if damage else 'whole'} ({format_bytes(size)})")
        for each in damage:
            print(f"  {each.file} {each.why}; tensors hit: {', '.join(grouped(each.tensors)) or 'none (the index)'}")
        if damage:
            bad.append(f"{path.name} ({'; '.join(each.file for each in damage)})")
    if bad:
        raise CheckpointError(f"{len(bad)} of {len(sets)} sets damaged: {', '.join(bad)}")
    return 0


def _check(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.checkpoint.describe import bytes_to_read
    from hpcpar.checkpoint.format import read_manifest
    from hpcpar.checkpoint.load import check_tensors
    from hpcpar.layout.layout import Layout
    from hpcpar.train.preflight import open_order
    from hpcpar.train.resume import changes, check_same

    job, path = whole_job(args.job, words), _set(args.run)
    manifest, layout = read_manifest(path), Layout(job)
    for option, saved, now, rule in changes(manifest.state["job"], job):
        print(f"{'may change' if rule.allowed else 'MUST NOT'}  {option}: {saved} -> {now}: {rule.why}")
    check_same(manifest.state, job, open_order(job), path)
    check_tensors(manifest, layout, path)
    wanted = [bytes_to_read(manifest, layout, rank) for rank in range(layout.mesh.size)]
    print(f"{args.job} can go on from {path}, step {manifest.step}")
    print(f"each of {len(wanted)} ranks reads {format_bytes(min(wanted))} to {format_bytes(max(wanted))} "
          f"({format_bytes(sum(wanted))} in all), of {format_bytes(sum(f.size for f in manifest.files))} stored")
    return 0


def _diff(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.checkpoint.compare import compare_sets

    first, second = _set(args.first), _set(args.second)
    for path in (first, second):
        _, damage = _verify_one(path)
        if damage:
            raise CheckpointError(f"{path}: {'; '.join(map(str, damage))}")
    num = 0
    for difference in compare_sets(first, second):
        num += 1
        if num <= SHOWN:
            print(f"{'FIRST DIFFERENCE: ' if num == 1 else ''}{difference}")
    print(f"{num} tensors differ" + (f", {num - SHOWN} not shown" if num > SHOWN else "") if num else
          f"{first} and {second} hold the same values")
    return 3 if num else 0


def _rewind(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.checkpoint.verify import named_sets, rewind
    from hpcpar.errors import did_you_mean
    from hpcpar.train.claim import refuse_if_running

    refuse_if_running(RunFolder(args.run))  # it would go on from where it is, and save over what is put back
    checkpoints = _checkpoints(args.run)
    by_name = {path.name: path for path in named_sets(checkpoints)}
    if args.set not in by_name:
        raise UserError(args.set, f"is not a set of {args.run}", did_you_mean(args.set, by_name))
    for aside in rewind(checkpoints, by_name[args.set]):
        print(f"moved aside: {aside}")
    print(f"{args.set} is whole and the newest: hpcpar train goes on from it")
    return 0


def _prune(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.checkpoint.prune import prune

    if args.keep < 1:
        raise UserError("KEEP", f"is {args.keep}, must be at least 1", "write 1")
    deleted, whole = prune(_checkpoints(args.run), args.keep)
    for path in deleted:
        print(f"deleted {path.name}")
    print(f"deleted {len(deleted)} sets; the newest that is whole is {whole.name}")
    return 0


def _verify_one(path: Path) -> tuple[int, list[Damage]]:
    """Verify a set behind a progress bar (on a terminal); return its size and what is wrong."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    from hpcpar.checkpoint.format import read_manifest
    from hpcpar.checkpoint.verify import find_damage

    manifest = read_manifest(path)
    size, console = sum(file.size for file in manifest.files), Console(stderr=True)
    with Progress("{task.description}", BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
                  console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(path.name, total=size)
        return size, find_damage(path, manifest, note=lambda num_bytes: bar.advance(task, num_bytes))


def _is_set(path: Path) -> bool:
    from hpcpar.checkpoint.format import MANIFEST, step_of

    return (path / MANIFEST).exists() or step_of(path.resolve().name) is not None


def _checkpoints(run: Path) -> Path:
    """Return the folder of a run's sets."""
    for path in (RunFolder(run).checkpoints, run):
        if any(path.glob("*step-*")):
            return path
    raise UserError(str(run), "has no checkpoint sets", "give the --run folder of a run that has saved")


def _set(path: Path) -> Path:
    """Return the set that a path means: itself, or a run's newest."""
    from hpcpar.checkpoint.verify import latest_set

    found = path if _is_set(path) else latest_set(_checkpoints(path))
    if found is None:
        raise UserError(str(path), "has no published checkpoint set", "hpcpar ckpt ls shows what is there")
    return found
