"""Pipeline schedules as values: every rank's list of actions, played on paper, checked and drawn without a process.

    make_schedule("interleaved", 4, 8, chunks=2)      a Schedule: who computes what in which order
    play_on_paper(schedule, duration)                 when each computation starts and ends
    make_programs(schedule)                           with sends and receives: what the executor plays
"""

from hpcpar.layout.schedule.actions import (
    COMPUTE,
    RECEIVES,
    SENDS,
    Action,
    Kind,
    Schedule,
    dependencies,
    ends_as,
    message,
    receive_of,
)
from hpcpar.layout.schedule.checks import check_programs, check_schedule
from hpcpar.layout.schedule.drawing import draw, draw_stale
from hpcpar.layout.schedule.named import ORDERS, forward_only, make_schedule, place_chunks
from hpcpar.layout.schedule.paper import Span, in_flight, play_on_paper, tick_table
from hpcpar.layout.schedule.programs import make_programs
from hpcpar.layout.schedule.stale import STALE, Staleness, staleness, stream, updates_behind

__all__ = [
    "COMPUTE", "ORDERS", "RECEIVES", "SENDS", "STALE", "Action", "Kind", "Schedule", "Span", "Staleness",
    "check_programs", "check_schedule", "dependencies", "draw", "draw_stale", "ends_as", "forward_only", "in_flight",
    "make_programs", "make_schedule", "message", "place_chunks", "play_on_paper", "receive_of", "staleness", "stream",
    "tick_table", "updates_behind",
]
