"""What a pipeline rank does: actions, what each waits for, and a schedule of them for all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple

from hpcpar.errors import HpcparError


class Kind(Enum):
    """What an action does; transfers are posted and not waited for, a computation waits for what it reads."""

    FORWARD = "F"
    BACKWARD = "B"  # both gradients: I, then W
    BACKWARD_INPUT = "I"  # the input's gradient only, which the chunk before waits for
    BACKWARD_WEIGHT = "W"  # the weights' gradients, which nobody waits for before the step's end
    RECEIVE_FORWARD = "rf"  # activations from the chunk before
    SEND_FORWARD = "sf"
    RECEIVE_BACKWARD = "rb"  # gradients from the chunk after
    SEND_BACKWARD = "sb"


COMPUTE = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
SENDS = (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)
RECEIVES = (Kind.RECEIVE_FORWARD, Kind.RECEIVE_BACKWARD)


class Action(NamedTuple):
    """One thing that a pipeline rank does.

    `chunk` is the part of the network that it concerns, counted from the embedding on over all ranks: of a send the
    chunk that made the message, of a receive the one that reads it. No action stands twice in a step.
    """

    kind: Kind
    microbatch: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.chunk}{self.kind.value}{self.microbatch}"


def dependencies(action: Action, num_chunks: int) -> list[Action]:
    """List the computations that a computation waits for, on whatever rank they run.

    I stands for whatever gives the input's gradient: a B ends as I and as W (`ends_as`).
    """
    kind, m, chunk = action
    if kind is Kind.FORWARD:
        return [Action(kind, m, chunk - 1)] if chunk > 0 else []
    if kind is Kind.BACKWARD_WEIGHT:
        return [Action(Kind.BACKWARD_INPUT, m, chunk)]
    after = [Action(Kind.BACKWARD_INPUT, m, chunk + 1)] if chunk < num_chunks - 1 else []
    return [Action(Kind.FORWARD, m, chunk), *after]


def ends_as(action: Action) -> tuple[Action, ...]:
    """List what has happened once a computation is done: a B is its I and its W too."""
    if action.kind is not Kind.BACKWARD:
        return (action,)
    return action, action._replace(kind=Kind.BACKWARD_INPUT), action._replace(kind=Kind.BACKWARD_WEIGHT)


def receive_of(send: Action) -> Action:
    """Return the receive that a send meets."""
    if send.kind is Kind.SEND_FORWARD:
        return Action(Kind.RECEIVE_FORWARD, send.microbatch, send.chunk + 1)
    return Action(Kind.RECEIVE_BACKWARD, send.microbatch, send.chunk - 1)


def message(action: Action, num_chunks: int) -> tuple[Action, Action] | None:
    """Return the send and the receive that follow a computation, if the next chunk is on another rank; else None.

    F sends activations to the chunk after, B and I gradients to the chunk before.
    """
    if action.kind is Kind.FORWARD and action.chunk < num_chunks - 1:
        send = action._replace(kind=Kind.SEND_FORWARD)
    elif action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and action.chunk > 0:
        send = action._replace(kind=Kind.SEND_BACKWARD)
    else:
        return None
    return send, receive_of(send)


@dataclass(frozen=True)
class Schedule:
    """The computations of a step: `orders[r]` is what pipeline rank r computes, one after the other."""

    orders: tuple[tuple[Action, ...], ...]

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.orders)

    @cached_property
    def chunk_ranks(self) -> tuple[int, ...]:
        """Which rank holds each chunk. Raises HpcparError where a chunk is missing or on two ranks."""
        found: dict[int, int] = {}
        for rank, order in enumerate(self.orders):
            for chunk in {action.chunk for action in order}:
                if chunk in found:
                    raise HpcparError(f"chunk {chunk} is on rank {found[chunk]} and on rank {rank}")
                found[chunk] = rank
        missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
        if missing:
            raise HpcparError(f"chunk {missing[0]} is on no rank")
        return tuple(found[chunk] for chunk in range(len(found)))

    @property
    def num_chunks(self) -> int:
        """Chunks on all ranks together."""
        return len(self.chunk_ranks)

    @cached_property
    def num_microbatches(self) -> int:
        """Microbatches of a step."""
        return 1 + max((action.microbatch for order in self.orders for action in order), default=-1)

    @cached_property
    def splits(self) -> bool:
        """Whether some backward is split into I and W."""
        return any(action.kind is Kind.BACKWARD_WEIGHT for order in self.orders for action in order)
