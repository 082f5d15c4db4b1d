"""Checks of schedules and programs that need no process."""

from __future__ import annotations

from collections import Counter, deque

from hpcpar.errors import HpcparError
from hpcpar.layout.schedule.actions import COMPUTE, RECEIVES, SENDS, Action, Kind, Schedule, receive_of
from hpcpar.layout.schedule.paper import play_on_paper

GROUPS = {Kind.SEND_FORWARD: "forward", Kind.RECEIVE_FORWARD: "forward",
          Kind.SEND_BACKWARD: "backward", Kind.RECEIVE_BACKWARD: "backward"}


def check_schedule(schedule: Schedule) -> None:
    """Raise HpcparError unless every chunk runs every microbatch forward and backward, once and in a possible order."""
    for rank, order in enumerate(schedule.orders):
        for action, times in Counter(order).items():
            if times > 1:
                raise HpcparError(f"{action} stands {times} times in the order of rank {rank}")
    played = {action for order in schedule.orders for action in order}
    for chunk, rank in enumerate(schedule.chunk_ranks):
        for m in range(schedule.num_microbatches):
            forward, whole, inputs, weights = (Action(kind, m, chunk) in played for kind in COMPUTE)
            if not forward:
                raise HpcparError(f"{chunk}F{m} is missing in the order of rank {rank}")
            if whole == (inputs or weights) or inputs != weights:
                raise HpcparError(f"rank {rank} needs either {chunk}B{m} or both {chunk}I{m} and {chunk}W{m}")
    play_on_paper(schedule, lambda action: 1)


class _Rank:
    """A rank's progress on the wires: what is left to compute, and to transfer in each group, with places."""

    def __init__(self, program: list[Action], groups: dict[Kind, str]):
        self.computes: deque[tuple[int, Action]] = deque()
        self.streams: dict[str, deque[tuple[int, Action]]] = {name: deque() for name in groups.values()}
        self.awaited = {a for a in program if a.kind in RECEIVES}
        for place, action in enumerate(program):
            queue = self.computes if action.kind in COMPUTE else self.streams[groups[action.kind]]
            queue.append((place, action))

    def head(self, group: str) -> Action | None:
        """Return a group's next transfer, once all that was to be computed before it is computed."""
        stream = self.streams[group]
        if not stream or (self.computes and self.computes[0][0] < stream[0][0]):
            return None
        return stream[0][1]

    def compute(self) -> bool:
        """Compute what can be computed; return whether anything could."""
        moved = False
        while self.computes:
            kind, m, chunk = self.computes[0][1]
            reads = Kind.RECEIVE_FORWARD if kind is Kind.FORWARD else Kind.RECEIVE_BACKWARD
            if kind is not Kind.BACKWARD_WEIGHT and Action(reads, m, chunk) in self.awaited:
                break
            self.computes.popleft()
            moved = True
        return moved


def check_programs(programs: list[list[Action]], groups: dict[Kind, str] | None = None) -> None:
    """Play all ranks on wires that buffer nothing; raise HpcparError if they lock up or messages meet wrong receives.

    The wires are NCCL's: a group's transfers run on a rank in the order of its program, each when what stands before
    it is computed, and only together with its counterpart. A computation waits for its own receive. MPI, which matches
    a pair's messages in the order of their posting and makes nobody wait, asks for less. Cost: O(actions).
    """
    groups = groups or GROUPS
    ranks = [_Rank(program, groups) for program in programs]
    receivers = {action: rank for rank, program in enumerate(programs) for action in program if action.kind in RECEIVES}
    moved = True
    while moved:
        moved = sum(rank.compute() for rank in ranks) > 0
        for index, rank in enumerate(ranks):
            for group, stream in rank.streams.items():
                while _transfer(ranks, receivers, index, rank.head(group), group):
                    stream.popleft()
                    moved = True
    stuck = [f"rank {i} at {place[1]}" for i, r in enumerate(ranks)
             for place in sorted([q[0] for q in (r.computes, *r.streams.values()) if q])[:1]]
    if stuck:
        raise HpcparError(f"schedule deadlocks: {', '.join(stuck)}")


def _transfer(ranks: list[_Rank], receivers: dict[Action, int], index: int, send: Action | None, group: str) -> bool:
    """Carry a rank's send over if its receiver stands at the matching receive; return whether it did."""
    if send is None or send.kind not in SENDS:
        return False
    wanted = receive_of(send)
    if wanted not in receivers:
        raise HpcparError(f"rank {index} sends {send}, which nobody receives")
    receiver = ranks[receivers[wanted]]
    if receiver.head(group) != wanted:
        return False
    receiver.streams[group].popleft()
    receiver.awaited.discard(wanted)
    return True
