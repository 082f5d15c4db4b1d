"""The pipeline on paper: how long a schedule takes, and how many microbatches it holds, for given chunk times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from hpcpar.errors import HpcparError
from hpcpar.layout.schedule import Action, Kind, Schedule, Span, in_flight, make_schedule, play_on_paper

INPUT_SHARE = 0.5  # of a backward: what the input's gradient takes where a schedule splits it from the weights'
ROUNDS = 3  # rounds of as many microbatches as ranks after which a schedule is in its steady state


def play(schedule: Schedule, forward_s: Sequence[float], backward_s: Sequence[float],
         message_s: float) -> dict[Action, Span]:
    """Play a schedule with each chunk's times; a message travels `message_s` and holds nobody up."""

    def duration(action: Action) -> float:
        if action.kind is Kind.FORWARD:
            return forward_s[action.chunk]
        share = {Kind.BACKWARD: 1.0, Kind.BACKWARD_INPUT: INPUT_SHARE, Kind.BACKWARD_WEIGHT: 1 - INPUT_SHARE}
        return share[action.kind] * backward_s[action.chunk]

    return play_on_paper(schedule, duration, lambda action: message_s)


def length_s(schedule: Schedule, forward_s: Sequence[float], backward_s: Sequence[float], message_s: float) -> float:
    """Return the end of the last action: what `play` gives, with numbers for actions, some ten times quicker."""
    num, last, home = schedule.num_microbatches, schedule.num_chunks - 1, schedule.chunk_ranks
    forward = [-1.0] * (num * (last + 1))  # when chunk x microbatch has ended; -1: not yet
    backward = [-1.0] * (num * (last + 1))
    orders = numbered(schedule)
    clock, position = [0.0] * len(orders), [0] * len(orders)
    travel = [0.0] + [message_s if home[c] != home[c - 1] else 0.0 for c in range(1, last + 1)]  # from chunk c - 1 to c
    weight = 1 - INPUT_SHARE
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            at, now = position[rank], clock[rank]
            while at < len(order):
                kind, chunk, index = order[at]
                if kind == 0:
                    ready = 0.0 if chunk == 0 else forward[index - num]
                    if ready < 0:
                        break
                    now = max(now, ready + travel[chunk]) + forward_s[chunk]
                    forward[index] = now
                elif kind == 3:
                    now += weight * backward_s[chunk]
                else:
                    ready = forward[index] if chunk == last else backward[index + num]
                    if ready < 0:
                        break
                    wait = 0.0 if chunk == last else travel[chunk + 1]
                    now = max(now, ready + wait) + backward_s[chunk] * (INPUT_SHARE if kind == 2 else 1.0)
                    backward[index] = now
                at += 1
                moved = True
            position[rank], clock[rank] = at, now
    if any(at < len(order) for at, order in zip(position, orders, strict=True)):
        raise HpcparError(f"schedule deadlocks: ranks stand at {position}")
    return max(clock)


def numbered(schedule: Schedule) -> list[list[tuple[int, int, int]]]:
    """Turn actions into (0 F, 1 B, 2 I, 3 W; chunk; chunk x microbatch)."""
    num = schedule.num_microbatches
    codes = {kind.value: code for code, kind in enumerate(
        (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT))}
    return [[(codes[kind.value], chunk, chunk * num + m) for kind, m, chunk in order] for order in schedule.orders]


def steady_step_s(forward_s: Sequence[float], backward_s: Sequence[float], num_microbatches: int,
                  message_s: float) -> float:
    """Return the length of 1F1B in closed form: a fill and drain, and a period for every further microbatch.

    The period is the slowest stage, or, where messages are slow, a round trip from a stage to the end and back shared
    by the microbatches that are under way on it.
    """
    num_stages = len(forward_s)
    behind, period = 0.0, 0.0
    for stage in reversed(range(num_stages)):
        both = forward_s[stage] + backward_s[stage]
        behind += both
        under_way = num_stages - stage
        period = max(period, both)
        if under_way < num_microbatches:
            period = max(period, (behind + 2 * (under_way - 1) * message_s) / under_way)
    return behind + 2 * (num_stages - 1) * message_s + (num_microbatches - 1) * period


def pipeline_s(name: str, num_ranks: int, num_microbatches: int, num_chunks: int, forward_s: Sequence[float],
               backward_s: Sequence[float], message_s: float) -> float:
    """Return the length of a step's forwards and backwards; times are a chunk's, in the network's order."""
    if num_ranks == 1 and num_chunks == 1:
        return num_microbatches * (sum(forward_s) + sum(backward_s))
    return played_s(name, num_ranks, num_microbatches, num_chunks,
                    lambda schedule: length_s(schedule, forward_s, backward_s, message_s))


def played_s(name: str, num_ranks: int, num_microbatches: int, num_chunks: int,
             play_all: Callable[[Schedule], float]) -> float:
    """Return how long `play_all` takes for a schedule of so many microbatches.

    A long step is played at two shorter lengths, whose difference repeats. Cost: O(ranks^2) actions.
    """

    def length(rounds: int) -> float:
        return play_all(schedule_of(name, num_ranks, rounds, num_chunks))

    short = ROUNDS * num_ranks
    if num_microbatches <= short + num_ranks:
        return length(num_microbatches)
    first, second = length(short), length(short + num_ranks)
    return first + (num_microbatches - short) / num_ranks * (second - first)


@lru_cache(maxsize=64)
def schedule_of(name: str, num_ranks: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """Remember the schedules made last."""
    return make_schedule(name, num_ranks, num_microbatches, num_chunks)


@lru_cache(maxsize=1024)
def held(name: str, num_ranks: int, num_microbatches: int, num_chunks: int) -> tuple[float, ...]:
    """Return the most microbatches whose activations each rank holds at once, in whole ranks' worth of layers.

    GPipe: all; 1F1B: ranks - rank; interleaved: 1 + (ranks - 1) / (ranks x chunks) times the ranks on the first.
    """
    if name == "gpipe":
        return (float(num_microbatches),) * num_ranks
    if name == "1f1b":
        return tuple(float(min(num_microbatches, num_ranks - rank)) for rank in range(num_ranks))
    if name == "interleaved":
        all_chunks = num_microbatches * num_chunks
        return tuple(min(all_chunks, 2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks + 1) / num_chunks
                     for rank in range(num_ranks))
    rounds = num_microbatches
    if name != "breadth-first":  # the others hold no more in a longer step
        rounds = min(num_microbatches, (ROUNDS + 1) * num_ranks)
    schedule = schedule_of(name, num_ranks, rounds, num_chunks)
    return tuple(in_flight(order) / num_chunks for order in schedule.orders)
