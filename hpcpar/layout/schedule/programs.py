"""A rank's whole program: its computations, and the posting of its sends and receives between them.

All transfers of a step have one order, that of a step played on paper in ticks, and both ranks of a transfer keep to
it. So wires that work off what is posted in order, and hold nothing back (NCCL), cannot lock up, whatever the
schedule: every computation and transfer waits only for what comes before it on paper.
"""

from __future__ import annotations

from hpcpar.layout.schedule.actions import Action, Schedule, message
from hpcpar.layout.schedule.paper import play_on_paper, ticks


def make_programs(schedule: Schedule) -> list[list[Action]]:
    """Return every rank's program. Cost: O(actions), about 10 us each.

    A send stands right behind the computation that made the message; a receive where the message is sent on paper,
    and so before the computation that reads it.
    """
    home, num_chunks = schedule.chunk_ranks, schedule.num_chunks
    moments: list[tuple[float, bool, int, int, Action]] = []  # when, whether it computes, tie, rank, action
    for action, (start, end) in play_on_paper(schedule, ticks(schedule)).items():
        rank = home[action.chunk]
        moments.append((start, True, rank, rank, action))
        sent = message(action, num_chunks)
        if sent and home[sent[1].chunk] != rank:
            moments += [(end, False, rank, rank, sent[0]), (end, False, rank, home[sent[1].chunk], sent[1])]
    programs: list[list[Action]] = [[] for _ in schedule.orders]
    for *_, rank, action in sorted(moments, key=lambda moment: moment[:3]):
        programs[rank].append(action)
    return programs
