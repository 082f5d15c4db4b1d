"""A user's own schedule: a line of actions for each pipeline rank."""

from __future__ import annotations

import re

from hpcpar.config.job import LayoutWish
from hpcpar.errors import HpcparError, UserError
from hpcpar.layout.schedule.actions import Action, Kind, Schedule
from hpcpar.layout.schedule.checks import check_schedule


def parse_table(wish: LayoutWish, num_microbatches: int) -> Schedule:
    """Return the schedule that layout.table spells, checked.

    A line holds what a rank computes, as "0F0,0F1,,0B0": chunk, F B I or W, microbatch. Empty cells and brackets count
    for nothing, so that tables written by torch.distributed.pipelining can be read. Raises UserError.
    """
    schedule = Schedule(tuple(tuple(_line(number, line)) for number, line in enumerate(wish.table, 1)))
    try:
        check_schedule(schedule)
    except HpcparError as error:
        raise UserError("layout.table", f"cannot be played: {error}", "every chunk and microbatch needs one F and one "
                        "B (or I and W), in an order that does not wait for itself") from None
    if schedule.num_ranks != wish.pp or schedule.num_chunks != wish.pp * wish.chunks:
        raise UserError("layout.table", f"has {schedule.num_ranks} ranks and {schedule.num_chunks} chunks, not pp = "
                        f"{wish.pp} and pp x chunks = {wish.pp * wish.chunks}", "mend pp and chunks, or the table")
    if schedule.num_microbatches != num_microbatches:
        raise UserError("layout.table", f"has {schedule.num_microbatches} microbatches, the job {num_microbatches}",
                        "set train.global_batch to layout.dp x train.microbatch x the microbatches of the table")
    return schedule


def _line(number: int, line: str) -> list[Action]:
    actions = []
    for word in re.split(r"[\s,;()]+", line.replace("OVERLAP_F_B", "")):
        found = re.fullmatch(r"(\d+)([FBIW])(\d+)", word)
        if found:
            actions.append(Action(Kind(found[2]), int(found[3]), int(found[1])))
        elif word:
            raise UserError("layout.table", f'line {number}: "{word}" is not chunk, F B I or W, microbatch',
                            'write for example "0F0 0F1 0B0 0B1"')
    return actions
