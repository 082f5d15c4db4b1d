"""A schedule as text."""

from __future__ import annotations

from hpcpar.layout.schedule.actions import Action, Schedule
from hpcpar.layout.schedule.paper import tick_table
from hpcpar.layout.schedule.stale import staleness, stream


def draw(schedule: Schedule, most: int = 64) -> str:
    """Draw a schedule, one line a stage; the chunk stands before the letter where stages have several.

    Of more than `most` ticks the first and the last are drawn: what lies between repeats.
    """
    several = schedule.num_chunks > schedule.num_ranks

    def name(action: Action | None) -> str:
        return "" if action is None else str(action) if several else f"{action.kind.value}{action.microbatch}"

    rows = tick_table(schedule)
    width = max(len(name(action)) for row in rows for action in row)
    length, lines = len(rows[0]), []
    for rank, row in enumerate(rows):
        cells = []
        for tick, action in enumerate(row):
            goes_on = tick and action is not None and row[tick - 1] == action
            cells.append("-" * width if goes_on else (name(action) or "." * width).ljust(width))
        if length > most:
            cells[most // 2:length - most // 2] = [f"~ {length - 2 * (most // 2)} ticks ~"]
        lines.append(f"stage {rank:<3}" + " ".join(cells))
    return "\n".join(lines)


def draw_stale(name: str, num_ranks: int, num_microbatches: int) -> str:
    """Draw three steps of a pipeline without flush, and tell how old its weights are."""
    lines = [draw(stream(num_ranks, num_microbatches, 3)), ""]
    for rank, (versions, delay) in enumerate(staleness(name, num_ranks, num_microbatches)):
        lines.append(f"stage {rank:<3}keeps {versions} versions of its weights; gradients are {delay} behind")
    return "\n".join([*lines, f"{name} is on paper only: hpcpar does not play what differs from one process"])
