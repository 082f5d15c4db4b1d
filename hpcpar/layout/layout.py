"""The layout: one pure value from which planner, trainer, checkpoint, rehearsal and picture all read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from hpcpar.config.job import Job, required
from hpcpar.layout.buckets import Bucket, Piece, make_buckets, owned_pieces
from hpcpar.layout.mesh import Mesh
from hpcpar.layout.parameters import Parameter, parameter_table
from hpcpar.layout.schedule import Action, Kind, stage_program, with_transfers
from hpcpar.layout.stages import split_layers, stage_parameters


@dataclass(frozen=True)
class Layout:
    """All that follows from a resolved job about who holds, computes and exchanges what.

    Every rank computes the whole of it in milliseconds, so that no rank has to ask another.
    """

    job: Job

    @cached_property
    def mesh(self) -> Mesh:
        """The mesh of ranks."""
        wish = self.job.layout
        return Mesh(wish.pp, required(wish.dp), wish.cp, wish.tp)

    @cached_property
    def table(self) -> tuple[Parameter, ...]:
        """The model's parameters."""
        return parameter_table(self.job.model)

    @cached_property
    def stages(self) -> tuple[range, ...]:
        """Each stage's layers."""
        return split_layers(self.job.model.layers, self.mesh.pp_size)

    @property
    def sequence_parallel(self) -> bool:
        """Whether norms and residuals are cut over tp."""
        return self.job.layout.sequence_parallel and self.mesh.tp_size > 1

    @property
    def num_shards(self) -> int:
        """Into how many pieces ZeRO cuts a bucket."""
        return self.mesh.dp_size if self.job.layout.zero else 1

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of weights and activations."""
        return {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}[self.job.train.precision]

    @property
    def main_bytes(self) -> int:
        """Bytes of an element of gradients, master weights and moments."""
        return 8 if self.job.train.precision == "fp64" else 4

    @property
    def tied_across_stages(self) -> bool:
        """Whether the first and the last stage both hold the embedding."""
        return self.job.model.tied and self.mesh.pp_size > 1

    def parameters(self, pp_rank: int) -> tuple[Parameter, ...]:
        """List the parameters on a stage."""
        return stage_parameters(self.table, self.stages, pp_rank, self.job.model.tied)

    def is_late(self, parameter: Parameter) -> bool:
        """Whether a gradient needs another sum before the one over dp: partial over tp, shared kv head, tied copy."""
        partial = parameter.partial and self.sequence_parallel
        tied = self.tied_across_stages and parameter.name == "embedding.token.weight"
        return partial or tied or parameter.shared_by(self.mesh.tp_size) > 1

    def buckets(self, pp_rank: int, tp_rank: int) -> tuple[Bucket, ...]:
        """Pack a (stage, tp rank)'s parameters; equal on all dp ranks, and kept: a save asks for every rank's."""
        known = self._known_buckets
        if (pp_rank, tp_rank) not in known:
            known[pp_rank, tp_rank] = self._pack(pp_rank, tp_rank)
        return known[pp_rank, tp_rank]

    @cached_property
    def _known_buckets(self) -> dict[tuple[int, int], tuple[Bucket, ...]]:
        return {}

    def _pack(self, pp_rank: int, tp_rank: int) -> tuple[Bucket, ...]:
        parameters = self.parameters(pp_rank)
        late = frozenset(p.name for p in parameters if self.is_late(p))
        limit = int(self.job.layout.bucket_mib * 2**20 / 4)
        return make_buckets(parameters, late, self.mesh.tp_size, tp_rank, self.num_shards, limit)

    def program(self, pp_rank: int, num_microbatches: int) -> list[Action]:
        """Return the actions that a stage plays in a step."""
        return stage_program(self.job.layout.schedule, self.mesh.pp_size, num_microbatches, pp_rank)

    def forward_program(self, pp_rank: int, num_microbatches: int) -> list[Action]:
        """Return the actions of a validation: forwards only."""
        forwards = [Action(Kind.FORWARD, m) for m in range(num_microbatches)]
        return with_transfers(forwards, self.mesh.pp_size, pp_rank)

    def counts(self, parameter: Parameter, pp_rank: int, tp_rank: int) -> bool:
        """Whether this rank's copy is the one that counts in global norms and is stored.

        Of several equal copies (replicated over tp, shared kv heads, tied on the last stage) the first counts.
        """
        if self.tied_across_stages and parameter.name == "embedding.token.weight" and pp_rank > 0:
            return False
        if parameter.tp_dim is None:
            return tp_rank == 0
        return tp_rank % parameter.shared_by(self.mesh.tp_size) == 0

    def stored_pieces(self, global_rank: int) -> list[Piece]:
        """List the boxes that a rank writes into a checkpoint: every element of the model once over all ranks."""
        at = self.mesh.coordinates(global_rank)
        if self.num_shards == 1 and at.dp_rank > 0:
            return []
        index = at.dp_rank if self.num_shards > 1 else 0
        pieces = owned_pieces(self.buckets(at.pp_rank, at.tp_rank), self.num_shards, index)
        return [p for p in pieces if self.counts(p.parameter, at.pp_rank, at.tp_rank)]

    def held_pieces(self, global_rank: int) -> list[Piece]:
        """List the boxes whose optimizer state a rank holds, copies included: what it reads from a checkpoint."""
        at = self.mesh.coordinates(global_rank)
        index = at.dp_rank if self.num_shards > 1 else 0
        return owned_pieces(self.buckets(at.pp_rank, at.tp_rank), self.num_shards, index)
