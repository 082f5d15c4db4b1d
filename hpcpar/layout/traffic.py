"""Every communication call of a step, rank by rank: what the planner prices and the rehearsal matches.

A test records what the trainer's ranks ask of MPI and compares it with this list: operation, group, order, bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from hpcpar.layout.buckets import Bucket
from hpcpar.layout.layout import Layout
from hpcpar.layout.loss import loss_chunks
from hpcpar.layout.mesh import Coordinates
from hpcpar.layout.schedule import COMPUTE, Action, Kind


class Call(NamedTuple):
    """One communication call of one rank.

    `num_bytes` is the size of the whole tensor: what is reduced, what an all-gather makes, what a reduce-scatter
    takes, what a message carries. `peer` is the other rank in the group (its stage) of a send or receive.
    """

    op: str  # all_reduce | all_gather | reduce_scatter | send | receive
    group: str  # one of mesh.GROUPS: a field of comm.groups.Groups
    num_bytes: int
    peer: int | None = None


def wire_bytes(call: Call, group_size: int) -> float:
    """Return what a rank sends for a call, by the ring algorithm; a receive sends nothing."""
    share = (group_size - 1) / group_size
    return {"all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share, "send": 1.0,
            "receive": 0.0}[call.op] * call.num_bytes


def needs_weights(unit: str, kind: Kind) -> bool:
    """Whether a computation reads a unit's weights: rows are looked up, and losses scored, in forward only."""
    return kind is Kind.FORWARD or unit not in ("embedding", "head")


@dataclass(frozen=True)
class Traffic:
    """The calls of one rank; equal for all dp ranks of a (stage, tp rank).

    CPU ranks of one host that hold weights in common gather none: there the all-gathers of ZeRO 3 fall away.
    """

    layout: Layout
    at: Coordinates

    def forward(self, chunk: int) -> tuple[Call, ...]:
        """Return the calls of one microbatch's forward through a chunk."""
        return self._compute(Kind.FORWARD, chunk, ())

    def backward(self, chunk: int) -> tuple[Call, ...]:
        """Return the calls of one microbatch's backward (B or I), those of recomputed forwards included."""
        return self._compute(Kind.BACKWARD, chunk, ())

    def during(self, action: Action, finished: tuple[int, ...] = ()) -> tuple[Call, ...]:
        """Return the calls of one action of the stage's program; `finished` numbers the buckets whose sums it posts."""
        if action.kind in COMPUTE:
            return self._compute(action.kind, action.chunk, finished)
        op, group, step = {
            Kind.RECEIVE_FORWARD: ("receive", "pp_forward", -1),
            Kind.SEND_FORWARD: ("send", "pp_forward", 1),
            Kind.RECEIVE_BACKWARD: ("receive", "pp_backward", 1),
            Kind.SEND_BACKWARD: ("send", "pp_backward", -1),
        }[action.kind]
        num_bytes = self._activation_bytes // (self._tp_size if self.layout.sequence_parallel else 1)
        return (Call(op, group, num_bytes, self.layout.chunk_ranks[action.chunk + step]),)

    def played(self, program: Sequence[Action]) -> Iterator[tuple[Action, tuple[Call, ...]]]:
        """Yield each action of a step with its calls; a bucket's sum over dp is posted when its last gradient is there.

        Where gradients are sharded that is so once a microbatch: whenever as many contributions have come as one has.
        """
        rounds = 1 + max(action.microbatch for action in program) if self.layout.shards_gradients else 1
        brings = [self.layout.contributions(self.at.pp_rank, bucket) for bucket in self._buckets]
        wanted = [sum(each[action.kind, action.chunk] for action in program) // rounds for each in brings]
        concerned: dict[tuple[Kind, int], list[int]] = {}
        for index, each in enumerate(brings):
            for key in each:
                concerned.setdefault(key, []).append(index)
        left = list(wanted)
        for action in program:
            finished = []
            for index in concerned.get((action.kind, action.chunk), ()):
                left[index] -= brings[index][action.kind, action.chunk]
                if left[index] <= 0:
                    finished.append(index)
                    left[index] += wanted[index]
            yield action, self.during(action, tuple(finished))

    @cached_property
    def late_reductions(self) -> tuple[Call, ...]:
        """What follows the last backward: sums of owned shards, across a hybrid's runs of dp ranks, over tp, or with
        the tied copy; then the step's four numbers.
        """
        across = self.layout.mesh.dp_inner not in (None, self.layout.mesh.dp_size)
        calls = [Call("all_reduce", "dp_across", self._shard_bytes(bucket)) for bucket in self._buckets if across]
        for bucket in self._buckets:
            if bucket.late:
                calls += self._with_tied_copy(bucket) if bucket.late == "tied" else [self._over_tp(bucket)]
        return (*calls, Call("all_reduce", "everyone", 4 * 8)) if self.layout.mesh.size > 1 else tuple(calls)

    @cached_property
    def update(self) -> tuple[Call, ...]:
        """The gathering of new weights over dp; those of ZeRO 3 are gathered when they are computed with."""
        if self.layout.num_shards == 1 or self.layout.shards_weights:
            return ()
        return tuple(self._gather(bucket) for bucket in self._buckets)

    def step(self, program: Sequence[Action]) -> list[Call]:
        """Return all calls of a step that plays `program`, in the order of each group."""
        calls = [call for _, of_action in self.played(program) for call in of_action]
        return [*calls, *self.late_reductions, *self.update]

    def _compute(self, kind: Kind, chunk: int, finished: tuple[int, ...]) -> tuple[Call, ...]:
        """Return a computation's calls unit by unit, the gathering of the next unit's weights ahead of each."""
        key = kind, chunk, finished
        if key not in self._known:
            steps = {Kind.FORWARD: self._forward_units, Kind.BACKWARD_WEIGHT: lambda _: []}.get(
                kind, self._backward_units)(chunk)
            ahead = deque(self._gathers(unit) for unit, _ in steps if needs_weights(unit, kind))
            calls = ahead.popleft() if ahead else []
            rest = [self._buckets[index] for index in finished]
            for unit, over_tp in steps:
                calls += ahead.popleft() if ahead and needs_weights(unit, kind) else []
                calls += over_tp
                at_once = [b for b in rest if self._ends_inside(b, unit, kind)]
                calls += self._over_dp(at_once)
                rest = [b for b in rest if b not in at_once]
            self._known[key] = (*calls, *self._over_dp(rest))
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[Kind, int, tuple[int, ...]], tuple[Call, ...]]:
        return {}

    def _ends_inside(self, bucket: Bucket, unit: str, kind: Kind) -> bool:
        """Whether a backward ends a bucket as soon as it has come through a unit."""
        return (self.layout.shards_gradients and kind is not Kind.FORWARD and bucket.unit == unit
                and not self.layout.is_put_off(bucket.slots[0].parameter))

    def _forward_units(self, chunk: int) -> list[tuple[str, list[Call]]]:
        """List what a forward computes, with each unit's calls over tp."""
        units = [("embedding", self._leave[0])] if chunk == 0 else []
        layer = (self._in_pieces(self._enter[0]) + self._in_pieces(self._leave[0])) * 2
        units += [(f"layers.{number}", layer) for number in self.layout.chunks[chunk]]
        if chunk == self._last_chunk:
            chunks = loss_chunks(self._tokens, self._loss_rows, self.layout.element_bytes) if self._tp_size > 1 else []
            loss = [Call("all_gather", "tp", 2 * self._tp_size * size * self._loss_bytes) for size in chunks]
            units += [("final_norm", []), ("head", self._enter[0] + loss)]
        return units

    def _backward_units(self, chunk: int) -> list[tuple[str, list[Call]]]:
        """List what a backward computes, with each unit's calls over tp."""
        enter, leave = ([self._in_pieces(calls) for calls in pair] for pair in (self._enter, self._leave))
        part, back = enter[0] + leave[0], leave[1] + enter[1]
        layer = back * 2
        if self.layout.job.layout.recompute == "full":
            # torch recomputes when backward first needs a kept tensor, and stops at the last one needed: without
            # dropout's mask both lie before the exchange that leaves the MLP, unless its product is one with it
            whole = self.layout.job.model.dropout > 0 or self.layout.job.layout.tp_pieces > 1
            layer = part * 2 + layer if whole else leave[1] + part + enter[0] + enter[1] + back
        units = [("head", self._enter[1]), ("final_norm", [])] if chunk == self._last_chunk else []
        units += [(f"layers.{number}", layer) for number in reversed(self.layout.chunks[chunk])]
        return units + ([("embedding", self._leave[1])] if chunk == 0 else [])

    def _gathers(self, unit: str) -> list[Call]:
        """Gather a unit's weights, where they are sharded; a tied head's are the embedding's."""
        if not self.layout.shards_weights:
            return []
        held = self.layout.unit_of_weights(unit)
        return [self._gather(bucket) for bucket in self._buckets if bucket.unit == held]

    def _gather(self, bucket: Bucket) -> Call:
        return Call("all_gather", "dp", bucket.numel * self.layout.element_bytes)

    @property
    def _tp_size(self) -> int:
        return self.layout.mesh.tp_size

    @property
    def _last_chunk(self) -> int:
        return len(self.layout.chunks) - 1

    @cached_property
    def _buckets(self) -> tuple[Bucket, ...]:
        return self.layout.buckets(self.at.pp_rank, self.at.tp_rank)

    @property
    def _tokens(self) -> int:
        return self.layout.job.train.microbatch * self.layout.job.model.seq

    @property
    def _activation_bytes(self) -> int:
        """Bytes of [batch, seq, hidden]."""
        return self._tokens * self.layout.job.model.hidden * self.layout.element_bytes

    @property
    def _loss_bytes(self) -> int:
        return max(4, self.layout.element_bytes)  # logits are widened to fp32

    @property
    def _loss_rows(self) -> int:
        """Logits a token on a tp rank, padding included."""
        head = next(p for p in self.layout.table if p.name == self.layout.output_matrix)
        return head.local_shape(self._tp_size, self.at.tp_rank)[0]

    @property
    def _enter(self) -> tuple[list[Call], list[Call]]:
        """Forward and backward calls before attention, MLP and head: what comm/collectives pairs."""
        return self._pair("all_gather", "reduce_scatter") if self.layout.sequence_parallel \
            else self._pair(None, "all_reduce")

    @property
    def _leave(self) -> tuple[list[Call], list[Call]]:
        """Forward and backward calls after embedding, attention and MLP."""
        return self._pair("reduce_scatter", "all_gather") if self.layout.sequence_parallel \
            else self._pair("all_reduce", None)

    def _pair(self, forward: str | None, backward: str | None) -> tuple[list[Call], list[Call]]:
        def calls(op: str | None) -> list[Call]:
            return [Call(op, "tp", self._activation_bytes)] if op and self._tp_size > 1 else []

        return calls(forward), calls(backward)

    def _in_pieces(self, calls: list[Call]) -> list[Call]:
        pieces = self.layout.job.layout.tp_pieces
        return [call._replace(num_bytes=call.num_bytes // pieces) for call in calls for _ in range(pieces)]

    def _over_dp(self, buckets: Sequence[Bucket]) -> list[Call]:
        op = "reduce_scatter" if self.layout.num_shards > 1 else "all_reduce"
        return [Call(op, "dp", bucket.numel * self.layout.main_bytes) for bucket in buckets
                if self.layout.mesh.dp_size > 1]

    def _over_tp(self, bucket: Bucket) -> Call:
        """One all-reduce; of kv heads that several tp ranks share, all have a place in it."""
        places = self._tp_size // bucket.slots[0].parameter.shared_by(self._tp_size) if bucket.late == "kv" else 1
        return Call("all_reduce", "tp", places * self._shard_bytes(bucket))

    def _with_tied_copy(self, bucket: Bucket) -> list[Call]:
        """Both ends of the pipeline swap their gradients of the embedding."""
        num_bytes = self._shard_bytes(bucket)
        first, last = self.layout.chunk_ranks[0], self.layout.chunk_ranks[-1]
        there, back, peer = ("pp_forward", "pp_backward", last) if self.at.pp_rank == first \
            else ("pp_backward", "pp_forward", first)
        return [Call("send", there, num_bytes, peer), Call("receive", back, num_bytes, peer)]

    def _shard_bytes(self, bucket: Bucket) -> int:
        return bucket.numel // self.layout.num_shards * self.layout.main_bytes
