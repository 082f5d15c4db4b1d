"""A full memory is explained with the planner's figures."""

from __future__ import annotations

import pytest
import torch

from hpcpar.config.job import Job
from hpcpar.config.load import override
from hpcpar.config.resolve import resolve
from hpcpar.errors import RunError
from hpcpar.layout.mesh import Coordinates
from hpcpar.train.shortage import explained

CPU = torch.device("cpu")


@pytest.fixture
def job() -> Job:
    wish = {"model": {"layers": 8, "hidden": 1024, "heads": 8, "seq": 1024, "vocab": 8192},
            "train": {"global_batch": 16, "microbatch": 4}, "layout": {"pp": 2, "dp": 2},
            "machine": {"gpu": "a100-80g"}}
    return resolve(override(Job(), **wish), 4)


def test_an_allocation_that_cannot_be_made_says_what_was_foretold_and_what_needs_less(job: Job) -> None:
    with pytest.raises(RunError) as caught, explained(job, Coordinates(1, 0, 0, 0), CPU):
        torch.empty(1 << 60, dtype=torch.uint8)
    said = str(caught.value)
    for words in ("memory is full", "can't allocate memory", "this rank has taken", "weights ", "moments ", "logits ",
                  "a100-80g", "less is needed with --", "a step of"):
        assert words in said, (words, said)
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_every_kind_of_full_memory_is_known(job: Job, error: Exception) -> None:
    with pytest.raises(RunError, match=r"memory is full.*foretold"), explained(job, Coordinates(0, 0, 0, 0), CPU):
        raise error


def test_other_errors_stay_what_they_are(job: Job) -> None:
    with pytest.raises(ValueError, match="else"), explained(job, Coordinates(0, 0, 0, 0), CPU):
        raise ValueError("something else")


def test_an_unknown_machine_does_not_hide_the_error(job: Job) -> None:
    unknown = override(job, machine={"gpu": "none-such"})
    with pytest.raises(RunError, match=r"this rank has taken .* not foretold"), explained(
            unknown, Coordinates(0, 0, 0, 0), CPU):
        raise MemoryError
