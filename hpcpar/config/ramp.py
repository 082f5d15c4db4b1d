"""Batch size as a pure function of the samples seen."""

from __future__ import annotations

from hpcpar.config.job import Job


def batch_size(job: Job, samples: int) -> int:
    """Return the global batch (sequences) of a step that starts after `samples` sequences.

    With a ramp [start, increment, over] the batch grows from start to global_batch in equal shares of `over`
    sequences (GPT-3, section 2.3: "gradually increase the batch size linearly").
    """
    if job.optim.ramp is None:
        return job.train.global_batch
    start, increment, over = job.optim.ramp
    increments = (job.train.global_batch - start) // increment
    if samples >= over or increments == 0:
        return job.train.global_batch
    return start + samples * increments // over * increment


def samples_before(job: Job, step: int) -> int:
    """Return how many sequences the steps before `step` take. Cost: O(steps inside the ramp)."""
    samples = done = 0
    while done < step and batch_size(job, samples) != job.train.global_batch:
        samples += batch_size(job, samples)
        done += 1
    return samples + (step - done) * job.train.global_batch
