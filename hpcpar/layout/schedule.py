"""Pipeline schedules as values: a stage's list of actions, and checks that need no process.

1F1B at 3 stages and 4 microbatches (time goes right; F and B of equal length):

    stage 0  F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3
    stage 1  .. F0 F1 .. B0 F2 B1 F3 B2 .. B3 ..
    stage 2  .. .. F0 B0 F1 B1 F2 B2 F3 B3 .. ..
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from hpcpar.errors import HpcparError


class Kind(Enum):
    """What an action does; a send is posted and not waited for, a receive is waited for."""

    FORWARD = "F"
    BACKWARD = "B"
    RECEIVE_FORWARD = "rf"  # activations from the stage before
    SEND_FORWARD = "sf"
    RECEIVE_BACKWARD = "rb"  # gradients from the stage after
    SEND_BACKWARD = "sb"


class Action(NamedTuple):
    """One step of a stage's program."""

    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.microbatch}"


def gpipe(num_stages: int, num_microbatches: int, stage: int) -> list[Action]:
    """All forwards, then all backwards. In flight: every microbatch. Source: Huang et al. 2019, arXiv 1811.06965."""
    forwards = [Action(Kind.FORWARD, m) for m in range(num_microbatches)]
    return forwards + [Action(Kind.BACKWARD, m) for m in range(num_microbatches)]


def one_f_one_b(num_stages: int, num_microbatches: int, stage: int) -> list[Action]:
    """Warm up, then alternate one forward and one backward, then drain.

    In flight on stage i: min(microbatches, stages - i). Source: PipeDream-flush, Narayanan et al. 2021, 2104.04473.
    """
    warm_up = min(num_microbatches, num_stages - stage - 1)
    actions = [Action(Kind.FORWARD, m) for m in range(warm_up)]
    for m in range(num_microbatches - warm_up):
        actions += [Action(Kind.FORWARD, warm_up + m), Action(Kind.BACKWARD, m)]
    return actions + [Action(Kind.BACKWARD, m) for m in range(num_microbatches - warm_up, num_microbatches)]


def compute_actions(schedule: str, num_stages: int, num_microbatches: int, stage: int) -> list[Action]:
    """Return a named schedule's forwards and backwards on one stage."""
    make = {"gpipe": gpipe, "1f1b": one_f_one_b}[schedule]
    return make(num_stages, num_microbatches, stage)


def with_transfers(actions: list[Action], num_stages: int, stage: int) -> list[Action]:
    """Put the receive that each action needs before it, and the send of its result after it."""
    full: list[Action] = []
    for kind, m in actions:
        if kind is Kind.FORWARD:
            full += [Action(Kind.RECEIVE_FORWARD, m)] if stage > 0 else []
            full.append(Action(kind, m))
            full += [Action(Kind.SEND_FORWARD, m)] if stage < num_stages - 1 else []
        else:
            full += [Action(Kind.RECEIVE_BACKWARD, m)] if stage < num_stages - 1 else []
            full.append(Action(kind, m))
            full += [Action(Kind.SEND_BACKWARD, m)] if stage > 0 else []
    return full


def stage_program(schedule: str, num_stages: int, num_microbatches: int, stage: int) -> list[Action]:
    """Return the complete list of actions that the executor plays on one stage."""
    return with_transfers(compute_actions(schedule, num_stages, num_microbatches, stage), num_stages, stage)


def in_flight(actions: list[Action]) -> int:
    """Return the most microbatches whose activations are held at once."""
    held = most = 0
    for kind, _ in actions:
        held += (kind is Kind.FORWARD) - (kind is Kind.BACKWARD)
        most = max(most, held)
    return most


@dataclass
class _Stage:
    """A stage's progress in the simulation: next action, and its posted sends by direction."""

    program: list[Action]
    next: int = 0

    def __post_init__(self) -> None:
        self.outbox: dict[Kind, int | None] = {Kind.SEND_FORWARD: None, Kind.SEND_BACKWARD: None}

    @property
    def done(self) -> bool:
        return self.next == len(self.program)


def check_programs(programs: list[list[Action]]) -> None:
    """Play all stages with zero-capacity channels; raise if they deadlock or a message meets the wrong receive.

    A send is posted without waiting (its buffer is held) but is delivered only when the receiver stands at the
    matching receive, and a second send in the same direction waits for the first: nothing is buffered on the way.
    Cost: O(actions) for all stages together times a small constant.
    """
    stages = [_Stage(program) for program in programs]
    moved = True
    while moved:
        moved = False
        for index, stage in enumerate(stages):
            while not stage.done and _advance(stages, index, stage):
                moved = True
    stuck = [f"stage {i} at {s.program[s.next]}" for i, s in enumerate(stages) if not s.done]
    unread = [f"stage {i} {k.value}{m}" for i, s in enumerate(stages) for k, m in s.outbox.items() if m is not None]
    if stuck or unread:
        raise HpcparError(f"schedule deadlocks: {', '.join(stuck)}; undelivered: {', '.join(unread) or 'none'}")


def _advance(stages: list[_Stage], index: int, stage: _Stage) -> bool:
    """Play one action if it can be played now."""
    kind, m = stage.program[stage.next]
    if kind in stage.outbox:
        if stage.outbox[kind] is not None:
            return False
        stage.outbox[kind] = m
    elif kind in (Kind.RECEIVE_FORWARD, Kind.RECEIVE_BACKWARD):
        forward = kind is Kind.RECEIVE_FORWARD
        sender, sends = (index - 1, Kind.SEND_FORWARD) if forward else (index + 1, Kind.SEND_BACKWARD)
        offered = stages[sender].outbox[sends]
        if offered is None:
            return False
        if offered != m:
            raise HpcparError(f"stage {index} waits for {kind.value}{m}, stage {sender} sends microbatch {offered}")
        stages[sender].outbox[sends] = None
    stage.next += 1
    return True


def tick_table(schedule: str, num_stages: int, num_microbatches: int) -> list[list[Action | None]]:
    """Return, stage by stage, which action runs in each tick when F and B take one tick and messages take none."""
    programs = [compute_actions(schedule, num_stages, num_microbatches, s) for s in range(num_stages)]
    finished: dict[tuple[int, Kind, int], int] = {}
    rows: list[list[Action | None]] = [[] for _ in range(num_stages)]
    position = [0] * num_stages
    tick = 0
    while any(p < len(program) for p, program in zip(position, programs, strict=True)):
        ran = []
        for stage, program in enumerate(programs):
            action = program[position[stage]] if position[stage] < len(program) else None
            if action and all(finished.get(n, tick) < tick for n in _needs(action, stage, num_stages)):
                ran.append((stage, action))
            else:
                action = None
            rows[stage].append(action)
        if not ran:
            raise HpcparError(f"schedule {schedule} deadlocks at tick {tick}")
        for stage, action in ran:
            finished[(stage, *action)] = tick
            position[stage] += 1
        tick += 1
    return rows


def _needs(action: Action, stage: int, num_stages: int) -> list[tuple[int, Kind, int]]:
    """List what must be finished before an action."""
    kind, m = action
    if kind is Kind.FORWARD:
        return [(stage - 1, kind, m)] if stage > 0 else []
    own = [(stage, Kind.FORWARD, m)]
    return own + ([(stage + 1, kind, m)] if stage < num_stages - 1 else [])


def draw(schedule: str, num_stages: int, num_microbatches: int) -> str:
    """Draw a schedule as text, one line a stage."""
    width = len(f"F{num_microbatches - 1}")
    rows = tick_table(schedule, num_stages, num_microbatches)
    return "\n".join(f"stage {s:<3}" + " ".join((str(a) if a else "." * width).ljust(width) for a in row)
                     for s, row in enumerate(rows))
