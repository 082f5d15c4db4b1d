"""What is checked before any communicator is made: the text of a job, and the folder of its run."""

from __future__ import annotations

import math
import os
import shutil

import torch

from hpcpar.checkpoint.format import step_of
from hpcpar.checkpoint.verify import latest_set, published_sets
from hpcpar.config.job import Job
from hpcpar.config.run_folder import RunFolder, read_lines
from hpcpar.data.sampler import SampleOrder
from hpcpar.data.store import TokenStore
from hpcpar.errors import CheckpointError, UserError
from hpcpar.layout.parameters import parameter_table
from hpcpar.parallel.buckets import KINDS


def open_order(job: Job) -> SampleOrder:
    """Open the job's stores and lay out the sample order. Raises UserError for what is missing or does not fit."""
    blend = ((job.data.store, 1.0),) if isinstance(job.data.store, str) else job.data.store
    stores = [TokenStore.open(path) for path, _ in blend]
    for store in stores:
        if store.vocab_size > job.model.vocab:
            raise UserError("model.vocab", f"{job.model.vocab} is smaller than the vocabulary of {store.path}: "
                            f"{store.vocab_size}", f"write vocab = {store.vocab_size}")
    return SampleOrder(stores, [weight for _, weight in blend], job.model.seq, job.train.seed, job.data.validation)


def check_compiler(job: Job, gpus: bool) -> None:
    """Refuse train.compile where torch could not compile: for CPUs it writes C++. `gpus`: those found are used."""
    compilers = ("g++", "clang++")
    on_cpu = not (gpus and torch.cuda.is_available())
    if job.train.compile and on_cpu and not any(shutil.which(name) for name in compilers):
        raise UserError("train.compile", f"needs a C++ compiler on CPU ({' or '.join(compilers)}), and none is on PATH",
                        "install one, or leave train.compile out")


def check_run_folder(folder: RunFolder, allow_fresh: bool) -> None:
    """Refuse a folder that has lost its sets, unless the user wants to start anew there.

    A broken newest set is refused in any case while an older good one exists: which to go on from is for people. A
    run that ended before its first set has lost nothing that a new start does not make again, so it may begin anew:
    at night, when its node was lost, nobody is there to say so.
    """
    try:
        found = latest_set(folder.checkpoints)
    except CheckpointError as error:
        if published_sets(folder.checkpoints) or not allow_fresh:
            raise UserError(str(folder.path), str(error), "or choose another --run folder, or, where no good set is "
                            "left, start anew in this one with --allow-fresh") from None
        found = None
    if found is None and not allow_fresh and _had_a_set(folder):
        raise UserError(str(folder.path), "was trained in and saved, but holds no valid checkpoint set",
                        "choose another --run folder, or start anew in it with --allow-fresh")


def _had_a_set(folder: RunFolder) -> bool:
    """Return whether anything in a run folder tells of a set: one that was saved, or imported."""
    return (any(folder.checkpoints.glob("step-*")) or any("save_s" in line for line in read_lines(folder.metrics))
            or any(line.get("set") or line["step"] for line in read_lines(folder.journal)))


def check_space(job: Job, folder: RunFolder) -> None:
    """Refuse a run whose file system has no room for the sets that it will hold: `keep`, and one more while it saves.

    Sets that are there already count, but for those that `keep_every` keeps; with keep = 0 (all stay) there must be
    room for one. A quota is not seen.
    """
    wish = job.checkpoint
    place = next(path for path in (folder.checkpoints, *folder.checkpoints.absolute().parents) if path.exists())
    disk = os.statvfs(place)
    free, one = disk.f_bavail * disk.f_frsize, set_bytes(job)
    steps = [step for path in folder.checkpoints.glob("step-*") if (step := step_of(path.name)) is not None]
    every = 1 if wish.every == "auto" else wish.every
    left = job.train.steps - max(steps, default=0)
    to_come = -(-left // every) if every else 1
    there = sum(not (wish.keep_every and step % wish.keep_every == 0) for step in steps)
    wanted = min(max(1, wish.keep + 1 - there) if wish.keep else 1, to_come)
    if left <= 0 or free >= wanted * one:
        return
    fits = free // one + there - 1
    fix = f"write keep = {fits}" if 0 < fits < wish.keep else "free space, or choose another --run folder"
    raise UserError("checkpoint.keep", f"{wish.keep} sets, and one more while it is saved, need "
                    f"{wanted * one / 2**30:.3g} GiB more in {folder.checkpoints} ({one / 2**30:.3g} GiB a set, "
                    f"{there} there), but {free / 2**30:.3g} GiB are free", fix)


def set_bytes(job: Job) -> int:
    """Return the bytes of the tensors in a checkpoint set."""
    itemsize = 8 if job.train.precision == "fp64" else 4
    return len(KINDS) * itemsize * sum(math.prod(p.shape) for p in parameter_table(job.model))


def put_aside(folder: RunFolder) -> None:
    """Move what an unusable earlier start left (`checkpoints`, `metrics.jsonl`) out of the way; nothing is deleted."""
    if published_sets(folder.checkpoints):
        return
    for path in (folder.checkpoints, folder.metrics):
        if path.exists():
            number = 1
            while (aside := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
                number += 1
            path.rename(aside)
