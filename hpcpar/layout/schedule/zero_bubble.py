"""Schedules that split a backward into I (the input's gradient) and W (the weights'), and fill the bubble with W."""

from __future__ import annotations

from collections import Counter, deque

from hpcpar.layout.schedule.actions import Action, Kind
from hpcpar.layout.schedule.orders import alternate, in_rounds

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741


def zero_bubble(p: int, m: int, v: int, rank: int) -> list[Action]:
    """ZB-H1: 1F1B with I in the place of B, and W behind it, on rank i after i further I; the rest fills the end.

    The bubble is a third of 1F1B's and every rank holds what 1F1B's first does: p microbatches. With v > 1 chunks a
    rank it is interleaved, and m a multiple of p. Source: Qi et al. 2023, arXiv 2401.10241, section 2.3.
    """
    forwards, inputs = in_rounds(p, m, v, rank, I)
    weights = deque(a._replace(kind=W) for a in inputs)
    order, num_inputs = [], 0
    for action in alternate(forwards, inputs, warm_up=(v - 1) * p + p - 1 - rank):
        order.append(action)
        if action.kind is I:
            num_inputs += 1
            if num_inputs > rank:
                order.append(weights.popleft())
    return [*order, *weights]


class _Tape:
    """A growing order that numbers the microbatches of each chunk and kind by itself."""

    def __init__(self) -> None:
        self.order: list[Action] = []
        self.played: Counter[tuple[Kind, int]] = Counter()
        self.weights: deque[Action] = deque()  # of the I played, not yet played themselves

    def play(self, kind: Kind, chunk: int) -> None:
        """Add the chunk's next F, I or B (B and I count together)."""
        counted = F if kind is F else I
        action = Action(kind, self.played[counted, chunk], chunk)
        self.played[counted, chunk] += 1
        self.order.append(action)
        if kind is I:
            self.weights.append(action._replace(kind=W))

    def play_weight(self, chunk: int | None = None) -> None:
        """Add the W that waits longest, of a chunk if one is given, if any waits."""
        waiting = next((a for a in self.weights if chunk in (None, a.chunk)), None)
        if waiting is not None:
            self.weights.remove(waiting)
            self.order.append(waiting)


def zbv(p: int, m: int, v: int, rank: int) -> list[Action]:
    """ZB-V: two chunks a rank in the shape of a V (first and last chunk on rank 0), no bubble if F, I and W are equal.

    In flight: 2 p chunks of half a stage. Source: Qi et al. 2023, arXiv 2401.10241, section 6.
    """
    down, up, enough = rank, 2 * p - 1 - rank, max(m, 2 * p - 1)  # what m has too few of is left out at the end
    tape = _Tape()

    def forward_and_backward(chunk: int) -> None:
        for kind in (F, I):
            tape.play(kind, chunk)
        tape.play_weight(chunk)

    for _ in range(2 * (p - rank) - 1):
        tape.play(F, down)
    for _ in range(rank):
        tape.play(F, up)
        tape.play(F, down)
    for _ in range(p - rank):
        forward_and_backward(up)
    while tape.played[F, up] < enough:
        if tape.played[F, down] < enough:
            tape.play(F, down)
        tape.play(I, down)
        tape.play_weight(down)
        forward_and_backward(up)
    for _ in range(rank):
        tape.play(I, down)
        tape.play(I, up)
    for _ in range(p - rank):
        tape.play(I, down)
        tape.play_weight(down)
    for chunk in (up, down):
        while any(a.chunk == chunk for a in tape.weights):
            tape.play_weight(chunk)
    return [action for action in tape.order if action.microbatch < m]


def dualpipev(p: int, m: int, v: int, rank: int) -> list[Action]:
    """DualPipeV: the V of ZB-V, a forward of one arm beside a backward of the other (played one after the other here).

    m is at least 2 p; in flight at most 2 p + 1 chunks of half a stage. Source: DeepSeek-V3, arXiv 2412.19437, section
    3.2.1, and its DualPipe repository.
    """
    down, up, below = rank, 2 * p - 1 - rank, p - rank - 1
    tape = _Tape()
    for _ in range(2 * below):
        tape.play(F, down)
    for _ in range(rank + 1):
        tape.play(F, down)
        tape.play(F, up)
    for _ in range(below):
        tape.play(I, up)
        tape.play_weight()
        tape.play(F, up)
    for _ in range(m - 2 * p + rank + 1):
        for forward, backward in ((down, up), (up, down)):
            tape.play(F, forward)
            tape.play(B, backward)
    for _ in range(below):
        tape.play(B, up)
        tape.play(F, up)
        tape.play(B, down)
    for turn in range(2 * rank + 2):  # from the middle on, W is kept for the ramp's end
        tape.play(B if turn < rank + 1 else I, (up, down)[turn % 2])
    for _ in range(below):
        tape.play_weight()
        tape.play(I, down)
    for _ in range(rank + 1):
        tape.play_weight()
    return tape.order
