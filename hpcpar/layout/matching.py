"""Proof, with no tensor and no process, that all ranks of a job make matching calls and none waits for ever.

The wires are the strictest there are: a collective waits for every member, a message goes over only when its sender
and its receiver both stand at it, and what a rank posted in a group goes in that order (NCCL; MPI asks for less).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import zip_longest
from typing import NamedTuple

from hpcpar.errors import HpcparError
from hpcpar.layout.layout import Layout
from hpcpar.layout.mesh import GROUPS, Mesh
from hpcpar.layout.schedule import COMPUTE, SENDS, Action, Kind, receive_of
from hpcpar.layout.traffic import Call, Traffic

READS = {Kind.FORWARD: Kind.RECEIVE_FORWARD, Kind.BACKWARD: Kind.RECEIVE_BACKWARD,
         Kind.BACKWARD_INPUT: Kind.RECEIVE_BACKWARD}
Message = tuple[object, ...]  # names a message on both ends: its receive


class Does(Enum):
    """What a move does."""

    MEET = 0  # collectives of one group, one after the other
    POST = 1  # a send or receive, not waited for
    AWAIT = 2  # the message that was received
    DRAIN = 3  # all that was posted


MEET, POST, AWAIT, DRAIN = Does  # looked up millions of times


class Move(NamedTuple):
    """Something that a rank does which others may have to wait for."""

    does: Does
    group: str = ""
    calls: tuple[Call, ...] = ()
    message: Message = ()


@dataclass(frozen=True)
class Matched:
    """What was proven."""

    num_ranks: int
    num_groups: int
    num_calls: int  # of all ranks
    num_messages: int

    def __str__(self) -> str:
        return (f"{self.num_ranks:,} ranks in {self.num_groups:,} groups: {self.num_calls:,} calls of a step match, "
                f"{self.num_messages:,} messages arrive, nobody waits for ever")


def moves_of_layout(layout: Layout, num_microbatches: int) -> Callable[[int], Sequence[Move]]:
    """Return a function from a global rank to its moves in a step; ranks of a stage with buckets alike share one list.

    Sums over dp are posted and overlap with what follows; here ranks stand at them.
    """
    known: dict[tuple[int, ...], list[Move]] = {}

    def moves(global_rank: int) -> list[Move]:
        at = layout.mesh.coordinates(global_rank)
        key = at.pp_rank, *(bucket.numel for bucket in layout.buckets(at.pp_rank, at.tp_rank))
        if key not in known:
            traffic = Traffic(layout, at)
            known[key] = [*_played(traffic, layout.program(at.pp_rank, num_microbatches)), Move(DRAIN),
                          *_in_groups(traffic.late_reductions), *_in_groups(traffic.update)]
        return known[key]

    return moves


def _played(traffic: Traffic, program: Sequence[Action]) -> list[Move]:
    """List what a stage's actions make a rank do; a computation waits for the message that it reads."""
    received = {action for action in program if action.kind in READS.values()}
    computed: dict[int, list[Move]] = {}  # by the identity of calls, which Traffic makes once
    moves: list[Move] = []
    for action, calls in traffic.played(program):
        if action.kind in COMPUTE:
            if action.kind in READS:
                reads = action._replace(kind=READS[action.kind])
                moves += [Move(AWAIT, message=reads)] if reads in received else []
            if id(calls) not in computed:
                computed[id(calls)] = _in_groups(calls)
            moves += computed[id(calls)]
        else:
            meets = receive_of(action) if action.kind in SENDS else action
            moves.append(Move(POST, calls[0].group, calls, meets))
    return moves


def _in_groups(calls: Sequence[Call]) -> list[Move]:
    """Join neighbouring collectives of one group; a message among them is waited for at once."""
    moves: list[Move] = []
    for call in calls:
        if call.op in ("send", "receive"):
            moves.append(Move(POST, call.group, (call,), ("closing", call.group)))
        elif moves and moves[-1].does is MEET and moves[-1].group == call.group:
            moves[-1] = moves[-1]._replace(calls=(*moves[-1].calls, call))
        else:
            moves += [Move(DRAIN)] if moves and moves[-1].does is POST else []
            moves.append(Move(MEET, call.group, (call,)))
    return [*moves, Move(DRAIN)] if moves and moves[-1].does is POST else moves


def match(mesh: Mesh, moves: Callable[[int], Sequence[Move]]) -> Matched:
    """Play all ranks of a mesh until each is done.

    Raises HpcparError naming group, ranks and calls where members of a group call different things, a message meets
    a receive of another size, or ranks wait for each other. Cost: about 2 us a move.
    """
    return _World(mesh, moves).play()


class _World:
    """All ranks, how far each has come, and who waits for whom."""

    def __init__(self, mesh: Mesh, moves: Callable[[int], Sequence[Move]]):
        self.mesh = mesh
        self.programs = [moves(rank) for rank in range(mesh.size)]
        self.at = [0] * mesh.size
        self.members = {group: _members(mesh, group) for group in GROUPS}
        self.standing: dict[tuple[str, int], list[int]] = {}  # ranks at a collective, by group and its first rank
        self.posted: dict[str, list[deque[Move]]] = {g: [deque() for _ in range(mesh.size)] for g in GROUPS}
        self.arrived: list[set[Message]] = [set() for _ in range(mesh.size)]
        self.runnable = list(range(mesh.size))
        self.listening = [False] * mesh.size  # stands at AWAIT or DRAIN: a message may set it going
        self.num_calls = self.num_messages = 0

    def play(self) -> Matched:
        while self.runnable:
            self._run(self.runnable.pop())
        stuck = [rank for rank, program in enumerate(self.programs) if self.at[rank] < len(program)]
        if stuck:
            places = {self._tell(rank): rank for rank in reversed(stuck)}  # one rank of those that stand alike
            some = "; ".join(f"rank {rank} waits for {place}" for place, rank in reversed(places.items()))
            raise HpcparError(f"{len(stuck)} ranks wait for each other: {some}")
        num_groups = len({(g, ranks[0]) for g in GROUPS for ranks in self.members[g] if len(ranks) > 1})
        return Matched(self.mesh.size, num_groups, self.num_calls, self.num_messages)

    def _run(self, rank: int) -> None:
        """Move a rank on until it has to wait."""
        program = self.programs[rank]
        while self.at[rank] < len(program):
            does, group, calls, message = program[self.at[rank]]
            if does is MEET:
                if not self._meet(rank, group, calls):
                    return
            elif does is POST:
                self.posted[group][rank].append(program[self.at[rank]])
                self._carry(rank, group)
            elif does is AWAIT:
                if message not in self.arrived[rank]:
                    self.listening[rank] = True
                    return
                self.arrived[rank].remove(message)
            elif any(self.posted[g][rank] for g in GROUPS):
                self.listening[rank] = True
                return
            self.at[rank] += 1

    def _meet(self, rank: int, group: str, calls: tuple[Call, ...]) -> bool:
        """Stand at collectives; the last member to come sets the others going."""
        ranks = self.members[group][rank]
        here = self.standing.setdefault((group, ranks[0]), [])
        if here:
            theirs = self.programs[here[0]][self.at[here[0]]].calls
            if theirs is not calls and theirs != calls:
                mine, other = next((a, b) for a, b in zip_longest(calls, theirs) if a != b)
                raise HpcparError(f"{group} group of ranks {ranks[0]}-{ranks[-1]}: rank {rank} calls {_say(mine)} "
                                  f"where rank {here[0]} calls {_say(other)}")
        if len(here) + 1 < len(ranks):
            here.append(rank)
            return False
        for other_rank in here:
            self.at[other_rank] += 1
        self.runnable += here
        here.clear()
        self.num_calls += len(calls) * len(ranks)
        return True

    def _carry(self, rank: int, group: str) -> None:
        """Carry messages over as long as two ranks stand at the same one."""
        trying = [rank]
        while trying:
            mine = trying.pop()
            peer = self._transfer(mine, group)
            if peer is not None:
                trying += [mine, peer]

    def _transfer(self, rank: int, group: str) -> int | None:
        """Carry over the message that a rank stands at, if its peer does too; return the peer."""
        posted, members = self.posted[group], self.members[group][rank]
        if not posted[rank]:
            return None
        call = posted[rank][0].calls[0]
        peer = members[call.peer or 0]
        other = posted[peer][0].calls[0] if posted[peer] else None
        if other is None or members[other.peer or 0] != rank or other.op == call.op:
            return None
        ends = [(rank, posted[rank][0]), (peer, posted[peer][0])]
        if other.num_bytes != call.num_bytes or ends[0][1].message != ends[1][1].message:
            raise HpcparError(f"{group}: " + " where ".join(f"rank {r} calls {_say_move(move)}" for r, move in ends))
        for end, move in ends:
            posted[end].popleft()
            if move.calls[0].op == "receive":
                self.arrived[end].add(move.message)
            if self.listening[end]:
                self.listening[end] = False
                self.runnable.append(end)
        self.num_calls += 2
        self.num_messages += 1
        return peer

    def _tell(self, rank: int) -> str:
        """Say what a rank waits for, and what it has posted that nobody took."""
        move = self.programs[rank][self.at[rank]]
        posted = [f"{_say_move(queue[rank][0])} in {g}" for g, queue in self.posted.items() if queue[rank]]
        wanted = {MEET: f"{_say_move(move)} in {move.group}", AWAIT: f"message {_name(move.message)}"}
        return wanted.get(move.does, "its messages") + (f" (posted: {', '.join(posted)})" if posted else "")


def _members(mesh: Mesh, group: str) -> list[tuple[int, ...]]:
    """Return the group of each rank; equal groups are one object."""
    if group == "everyone":
        return [mesh.members(group, 0)] * mesh.size
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    return [known.setdefault(found, found) for found in (mesh.members(group, rank) for rank in range(mesh.size))]


def _say(call: Call | None) -> str:
    if call is None:
        return "nothing"
    return f"{call.op} of {call.num_bytes:,} bytes" + ("" if call.peer is None else f" with stage {call.peer}")


def _say_move(move: Move) -> str:
    call = _say(move.calls[0] if move.calls else None)
    return f"{call} for {_name(move.message)}" if move.message else call


def _name(message: Message) -> str:
    return str(message) if isinstance(message, Action) else "".join(map(str, message))
