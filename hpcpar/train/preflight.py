"""What is checked before any communicator is made: the text of a job, and the folder of its run."""

from __future__ import annotations

from hpcpar.checkpoint.verify import latest_set, published_sets
from hpcpar.config.job import Job
from hpcpar.config.run_folder import RunFolder
from hpcpar.data.sampler import SampleOrder
from hpcpar.data.store import TokenStore
from hpcpar.errors import CheckpointError, UserError


def open_order(job: Job) -> SampleOrder:
    """Open the job's stores and lay out the sample order. Raises UserError for what is missing or does not fit."""
    blend = ((job.data.store, 1.0),) if isinstance(job.data.store, str) else job.data.store
    stores = [TokenStore.open(path) for path, _ in blend]
    for store in stores:
        if store.vocab_size > job.model.vocab:
            raise UserError("model.vocab", f"{job.model.vocab} is smaller than the vocabulary of {store.path}: "
                            f"{store.vocab_size}", f"write vocab = {store.vocab_size}")
    return SampleOrder(stores, [weight for _, weight in blend], job.model.seq, job.train.seed, job.data.validation)


def check_run_folder(folder: RunFolder, allow_fresh: bool) -> None:
    """Refuse a folder that was trained in but has no valid set, unless the user wants to start anew there.

    A broken newest set is refused in any case while an older good one exists: which to go on from is for people.
    """
    trained = folder.metrics.exists() or (folder.checkpoints.exists() and any(folder.checkpoints.iterdir()))
    try:
        found = latest_set(folder.checkpoints)
    except CheckpointError as error:
        if published_sets(folder.checkpoints) or not allow_fresh:
            raise UserError(str(folder.path), str(error), "or choose another --run folder, or, where no good set is "
                            "left, start anew in this one with --allow-fresh") from None
        found = None
    if trained and found is None and not allow_fresh:
        raise UserError(str(folder.path), "was trained in, but holds no valid checkpoint set",
                        "choose another --run folder, or start anew in it with --allow-fresh")


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
