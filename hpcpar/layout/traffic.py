"""Every communication call of a step, rank by rank: what the planner prices and the rehearsal matches.

A test records what the trainer's ranks ask of MPI and compares it with this list: operation, group, order, bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    group: str  # tp | dp | pp_forward | pp_backward | everyone: a field of comm.groups.Groups
    num_bytes: int
    peer: int | None = None


def wire_bytes(call: Call, group_size: int) -> float:
    """Return what a rank sends for a call, by the ring algorithm; a receive sends nothing."""
    share = (group_size - 1) / group_size
    return {"all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share, "send": 1.0,
            "receive": 0.0}[call.op] * call.num_bytes


@dataclass(frozen=True)
class Traffic:
    """The calls of one rank; equal for all dp ranks of a (stage, tp rank)."""

    layout: Layout
    at: Coordinates

    def forward(self, chunk: int) -> tuple[Call, ...]:
        """Return the calls of one microbatch's forward through a chunk."""
        calls = self._leave[0] if chunk == 0 else []
        calls += (self._enter[0] + self._leave[0]) * (2 * len(self.layout.chunks[chunk]))
        if chunk == self._last_chunk and self._tp_size > 1:
            chunks = loss_chunks(self._tokens, self._loss_rows, self.layout.element_bytes)
            calls += [*self._enter[0], *(Call("all_gather", "tp", 2 * self._tp_size * size * self._loss_bytes)
                                         for size in chunks)]
        return tuple(calls)

    def backward(self, chunk: int) -> tuple[Call, ...]:
        """Return the calls of one microbatch's backward (B or I), those of recomputed forwards included."""
        part, back = self._enter[0] + self._leave[0], self._leave[1] + self._enter[1]
        layer = back * 2
        if self.layout.job.layout.recompute == "full":
            # torch recomputes when backward first needs a kept tensor, and stops at the last one needed: without
            # dropout's mask both lie before the exchange that leaves the MLP
            dropout = self.layout.job.model.dropout > 0
            layer = part * 2 + layer if dropout else self._leave[1] + part + self._enter[0] + self._enter[1] + back
        return tuple((self._enter[1] if chunk == self._last_chunk else []) + layer * len(self.layout.chunks[chunk])
                     + (self._leave[1] if chunk == 0 else []))

    def during(self, action: Action) -> tuple[Call, ...]:
        """Return the calls of one action of the stage's program."""
        if action.kind is Kind.FORWARD:
            return self.forward(action.chunk)
        if action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
            return self.backward(action.chunk)
        if action.kind is Kind.BACKWARD_WEIGHT:
            return ()
        op, group, step = {
            Kind.RECEIVE_FORWARD: ("receive", "pp_forward", -1),
            Kind.SEND_FORWARD: ("send", "pp_forward", 1),
            Kind.RECEIVE_BACKWARD: ("receive", "pp_backward", 1),
            Kind.SEND_BACKWARD: ("send", "pp_backward", -1),
        }[action.kind]
        num_bytes = self._activation_bytes // (self._tp_size if self.layout.sequence_parallel else 1)
        return (Call(op, group, num_bytes, self.layout.chunk_ranks[action.chunk + step]),)

    @cached_property
    def early_reductions(self) -> tuple[Call, ...]:
        """Sums of gradients over dp that are posted, bucket by bucket, while the step's last backward runs."""
        return tuple(call for bucket in self._buckets if not bucket.late for call in self._over_dp(bucket))

    @cached_property
    def late_reductions(self) -> tuple[Call, ...]:
        """What follows the last backward: sums over tp or with the tied copy, then over dp; the step's four numbers.
        """
        calls: list[Call] = []
        for bucket in self._buckets:
            if bucket.late:
                tied = bucket.slots[0].parameter.is_vocabulary
                calls += self._with_tied_copy(bucket) if tied else self._over_tp(bucket)
                calls += self._over_dp(bucket)
        return (*calls, Call("all_reduce", "everyone", 4 * 8)) if self.layout.mesh.size > 1 else tuple(calls)

    @cached_property
    def update(self) -> tuple[Call, ...]:
        """The gathering of new weights over dp."""
        if self.layout.num_shards == 1:
            return ()
        return tuple(Call("all_gather", "dp", b.numel * self.layout.element_bytes) for b in self._buckets)

    def step(self, program: Sequence[Action]) -> list[Call]:
        """Return all calls of a step that plays `program`, in the order of each group.

        Early reductions overlap with the last backward; here they stand after it.
        """
        last = max(i for i, action in enumerate(program) if action.kind in COMPUTE)
        calls: list[Call] = []
        for index, action in enumerate(program):
            calls += self.during(action)
            calls += self.early_reductions if index == last else ()
        return [*calls, *self.late_reductions, *self.update]

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
        name = "embedding.token.weight" if self.layout.job.model.tied else "head.weight"
        head = next(p for p in self.layout.table if p.name == name)
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

    def _over_dp(self, bucket: Bucket) -> list[Call]:
        op = "reduce_scatter" if self.layout.num_shards > 1 else "all_reduce"
        num_bytes = bucket.numel * self.layout.main_bytes
        return [Call(op, "dp", num_bytes)] if self.layout.mesh.dp_size > 1 else []

    def _over_tp(self, bucket: Bucket) -> list[Call]:
        """One all-reduce; kv heads that several tp ranks share have places for all heads in it."""
        numel = 0
        for slot in bucket.slots:
            shared = slot.parameter.shared_by(self._tp_size)
            numel += slot.numel * (self._tp_size // shared if shared > 1 else 1)
        return [Call("all_reduce", "tp", numel * self.layout.main_bytes)]

    def _with_tied_copy(self, bucket: Bucket) -> list[Call]:
        """Both ends of the pipeline swap their gradients of the embedding."""
        num_bytes = bucket.numel * self.layout.main_bytes
        first, last = self.layout.chunk_ranks[0], self.layout.chunk_ranks[-1]
        there, back, peer = ("pp_forward", "pp_backward", last) if self.at.pp_rank == first \
            else ("pp_backward", "pp_forward", first)
        return [Call("send", there, num_bytes, peer), Call("receive", back, num_bytes, peer)]
