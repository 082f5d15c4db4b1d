"""A schedule as text."""

from __future__ import annotations

from hpcpar.layout.schedule.actions import Action, Schedule
from hpcpar.layout.schedule.paper import tick_table


def draw(schedule: Schedule) -> str:
    """Draw a schedule, one line a stage; the chunk stands before the letter where stages have several."""
    several = schedule.num_chunks > schedule.num_ranks

    def name(action: Action | None) -> str:
        return "" if action is None else str(action) if several else f"{action.kind.value}{action.microbatch}"

    rows = tick_table(schedule)
    width = max(len(name(action)) for row in rows for action in row)
    lines = []
    for rank, row in enumerate(rows):
        cells = []
        for tick, action in enumerate(row):
            goes_on = tick and action is not None and row[tick - 1] == action
            cells.append("-" * width if goes_on else (name(action) or "." * width).ljust(width))
        lines.append(f"stage {rank:<3}" + " ".join(cells))
    return "\n".join(lines)
