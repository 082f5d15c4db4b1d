"""The layout: one pure value from which planner, trainer, checkpoint, rehearsal and picture all read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property, partial

from hpcpar.config.job import Job, required
from hpcpar.layout.buckets import Bucket, Piece, make_buckets, owned_pieces
from hpcpar.layout.mesh import Coordinates, Mesh
from hpcpar.layout.parameters import Parameter, parameter_table
from hpcpar.layout.schedule import Action, Kind, Schedule, forward_only, make_programs, make_schedule, place_chunks
from hpcpar.layout.schedule.table import parse_table
from hpcpar.layout.stages import chunk_parameters, split_layers


@dataclass(frozen=True)
class Layout:
    """All that follows from a resolved job about who holds, computes and exchanges what.

    Every rank computes the whole of it in milliseconds, so that no rank has to ask another.
    """

    job: Job

    def __post_init__(self) -> None:
        """Refuse a user's table that cannot be played, before any rank starts to."""
        if self.job.layout.schedule == "table":
            self.schedule(self.num_microbatches)

    @cached_property
    def mesh(self) -> Mesh:
        """The mesh of ranks."""
        wish = self.job.layout
        inner = wish.num_shards if isinstance(wish.zero, tuple) else None
        return Mesh(wish.pp, required(wish.dp), wish.cp, wish.tp, inner)

    @cached_property
    def table(self) -> tuple[Parameter, ...]:
        """The model's parameters."""
        return parameter_table(self.job.model)

    @property
    def output_matrix(self) -> str:
        """The name of the parameter that scores."""
        return "embedding.token.weight" if self.job.model.tied else "head.weight"

    def unit_of_weights(self, unit: str) -> str:
        """Name the unit whose parameters a unit computes with: a tied head scores with the embedding's."""
        return "embedding" if unit == "head" and self.job.model.tied else unit

    @cached_property
    def chunk_ranks(self) -> tuple[int, ...]:
        """The pipeline rank of each chunk of the network, from the embedding to the logits."""
        if self.job.layout.schedule == "table":
            return self.schedule(self.num_microbatches).chunk_ranks
        return place_chunks(self.job.layout.schedule, self.mesh.pp_size, self.job.layout.chunks)

    @cached_property
    def chunks(self) -> tuple[range, ...]:
        """Each chunk's layers."""
        return split_layers(self.job.model.layers, self.chunk_ranks)

    def chunks_of(self, pp_rank: int) -> list[int]:
        """List the chunks that a stage holds."""
        return [chunk for chunk, rank in enumerate(self.chunk_ranks) if rank == pp_rank]

    @cached_property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """Each stage's layers: those of its chunks."""
        return tuple(tuple(layer for chunk in self.chunks_of(pp_rank) for layer in self.chunks[chunk])
                     for pp_rank in range(self.mesh.pp_size))

    @property
    def sequence_parallel(self) -> bool:
        """Whether norms and residuals are cut over tp."""
        return self.job.layout.cuts_sequence

    @property
    def num_shards(self) -> int:
        """Into how many pieces ZeRO cuts a bucket."""
        return self.job.layout.num_shards

    def shard_of(self, at: Coordinates) -> tuple[int, int]:
        """Return which shard a rank owns, and the number of its copy: 0, but for equal shards of other dp ranks."""
        copy, shard = divmod(at.dp_rank, self.num_shards)
        return shard, copy

    @property
    def shards_gradients(self) -> bool:
        """Whether a rank keeps only its owned gradients between microbatches (ZeRO 2 and 3)."""
        return self.num_shards > 1 and self.job.layout.zero_stage >= 2

    @property
    def shards_weights(self) -> bool:
        """Whether a rank keeps only its owned weights, and gathers a unit's while it computes with them (ZeRO 3)."""
        return self.num_shards > 1 and self.job.layout.zero_stage == 3

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
        """Whether the embedding is held twice: on the first chunk's stage and, for the logits, on the last's."""
        return self.job.model.tied and self.chunk_ranks[0] != self.chunk_ranks[-1]

    def parameters(self, pp_rank: int) -> tuple[Parameter, ...]:
        """List the parameters on a stage, in the order of the forward pass."""
        held = [p for chunk in self.chunks_of(pp_rank)
                for p in chunk_parameters(self.table, self.chunks, chunk, self.job.model.tied)]
        return tuple(dict.fromkeys(held))  # in a V one stage may have both uses of a tied embedding

    def late(self, parameter: Parameter) -> str:
        """Name what a gradient needs besides the sum over dp, in the words of `Bucket`; mostly nothing."""
        if self.tied_across_stages and parameter.name == "embedding.token.weight":
            return "tied"
        if parameter.partial and self.sequence_parallel:
            return "tp"
        return "kv" if parameter.shared_by(self.mesh.tp_size) > 1 else ""

    def is_put_off(self, parameter: Parameter) -> bool:
        """Whether a gradient is computed by W: a layer's matrix, where the schedule splits backwards."""
        return parameter.layer is not None and parameter.decayed and self.splits_backward

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
        limit = int(self.job.layout.bucket_mib * 2**20 / 4)

        def apart(parameter: Parameter) -> Hashable:
            # what an action does not finish as a whole would be held whole until another one does
            return (parameter.unit, self.is_put_off(parameter)) if self.shards_gradients else None

        return make_buckets(parameters, self.late, apart, self.mesh.tp_size, tp_rank, self.num_shards, limit)

    def contributions(self, pp_rank: int, bucket: Bucket) -> Counter[tuple[Kind, int]]:
        """Count what each action on a chunk adds to a bucket's gradient: one for every use of a parameter."""
        mine, last = self.chunks_of(pp_rank), len(self.chunks) - 1
        home = {layer: chunk for chunk in mine for layer in self.chunks[chunk]}
        found: Counter[tuple[Kind, int]] = Counter()
        for parameter in (slot.parameter for slot in bucket.slots):
            if parameter.layer is not None:
                of_split = Kind.BACKWARD_WEIGHT if self.is_put_off(parameter) else Kind.BACKWARD_INPUT
                uses = [(kind, home[parameter.layer]) for kind in (Kind.BACKWARD, of_split)]
            else:
                chunk = last if parameter.unit == "final_norm" else 0
                looks_up = parameter.unit in ("embedding", "final_norm") and chunk in mine
                uses = [(kind, chunk) for kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) if looks_up]
                if parameter.name == self.output_matrix and last in mine:  # its gradient comes with the loss
                    uses.append((Kind.FORWARD, last))
            found.update(uses)
        return found

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a replica in a step of the full batch."""
        return self.job.train.global_batch // (self.mesh.dp_size * self.job.train.microbatch)

    def schedule(self, num_microbatches: int) -> Schedule:
        """Return what all stages compute in a step, in which order."""
        wish = self.job.layout
        if wish.schedule == "table":
            return parse_table(wish, num_microbatches)
        return make_schedule(wish.schedule, self.mesh.pp_size, num_microbatches, wish.chunks)

    @cached_property
    def splits_backward(self) -> bool:
        """Whether some weight gradients are computed apart."""
        return self.schedule(self.num_microbatches).splits

    def program(self, pp_rank: int, num_microbatches: int) -> list[Action]:
        """Return the actions that a stage plays in a step."""
        return self._programs(num_microbatches, False)[pp_rank]

    def forward_program(self, pp_rank: int, num_microbatches: int) -> list[Action]:
        """Return the actions of a validation: forwards only."""
        return self._programs(num_microbatches, True)[pp_rank]

    def _programs(self, num_microbatches: int, only_forward: bool) -> list[list[Action]]:
        key = (num_microbatches, only_forward)
        if key not in self._known_programs:
            make = partial(forward_only, self.chunk_ranks) if only_forward else self.schedule
            self._known_programs[key] = make_programs(make(num_microbatches))
        return self._known_programs[key]

    @cached_property
    def _known_programs(self) -> dict[tuple[int, bool], list[list[Action]]]:
        return {}  # every step asks, and asks for the same

    def counts(self, parameter: Parameter, pp_rank: int, tp_rank: int) -> bool:
        """Whether this rank's copy is the one that counts in global norms and is stored.

        Of several equal copies (replicated over tp, shared kv heads, tied on the last chunk) the first counts.
        """
        tied = self.tied_across_stages and parameter.name == "embedding.token.weight"
        if tied and pp_rank != self.chunk_ranks[0]:
            return False
        if parameter.tp_dim is None:
            return tp_rank == 0
        return tp_rank % parameter.shared_by(self.mesh.tp_size) == 0

    def stored_pieces(self, global_rank: int) -> list[Piece]:
        """List the boxes that a rank writes into a checkpoint: every element of the model once over all ranks."""
        at = self.mesh.coordinates(global_rank)
        index, copy = self.shard_of(at)
        if copy > 0:
            return []
        pieces = owned_pieces(self.buckets(at.pp_rank, at.tp_rank), self.num_shards, index)
        return [p for p in pieces if self.counts(p.parameter, at.pp_rank, at.tp_rank)]

    def held_pieces(self, global_rank: int) -> list[Piece]:
        """List the boxes whose optimizer state a rank holds, copies included: what it reads from a checkpoint."""
        at = self.mesh.coordinates(global_rank)
        index, _ = self.shard_of(at)
        return owned_pieces(self.buckets(at.pp_rank, at.tp_rank), self.num_shards, index)
