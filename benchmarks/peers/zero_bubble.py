"""The program of plain.py on torch's ScheduleInterleavedZeroBubble: with one chunk a stage it is ZB1P."""

from __future__ import annotations

from plain import Plain
from torch.distributed.pipelining import PipelineStage, ScheduleInterleavedZeroBubble
from work import Step, Weights, Work


def open_program(work: Work, weights: Weights) -> Step:
    """Return this rank's training step."""
    return Plain(work, weights, _make_schedule).step


def _make_schedule(stage: PipelineStage, num_microbatches: int, loss_fn: object) -> ScheduleInterleavedZeroBubble:
    return ScheduleInterleavedZeroBubble([stage], num_microbatches, loss_fn=loss_fn)
