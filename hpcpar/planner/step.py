"""How long a step takes: chunks priced from shapes, the pipeline played, gradients summed, weights updated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from hpcpar.config.job import Job, required
from hpcpar.config.resolve import splits_backward
from hpcpar.layout.schedule import Schedule, in_flight, place_chunks
from hpcpar.layout.schedule.table import parse_table
from hpcpar.layout.stages import split_layers
from hpcpar.planner.compute import BESIDE, Cut, Seconds, copied_s, ends_time, layer_time
from hpcpar.planner.hardware import Machine
from hpcpar.planner.memory import ELEMENT_BYTES, Memory, inputs_bytes, layer_bytes, stage_memory
from hpcpar.planner.network import gather_s, message_s, reduce_s, ring
from hpcpar.planner.params import Counts, rank_counts
from hpcpar.planner.practice import TRAINER, Practice, trainer
from hpcpar.planner.sharing import Node, as_rank_sees, shared_length_s
from hpcpar.planner.timeline import held, length_s, pipeline_s, played_s, steady_step_s

TAIL = 0.1  # of the last backward: its gradients come too late for their sum to be hidden


@dataclass(frozen=True)
class ChunkTime:
    """One chunk's work on one microbatch."""

    forward: Seconds
    backward: Seconds

    @property
    def total(self) -> float:
        """Both directions."""
        return self.forward.total + self.backward.total


@dataclass(frozen=True)
class StepTime:
    """A step's length and where it goes: `parts` of the busiest rank add up to `total`."""

    total: float
    bubble: float  # idle time over work of the busiest pipeline rank
    parts: dict[str, float]
    hidden: dict[str, float]  # communication that runs beside computation


def chunk_layers(num_layers: int, chunk_ranks: tuple[int, ...], practice: Practice = TRAINER) -> tuple[int, ...]:
    """Return how many layers each chunk of the network holds, in order."""
    if practice.embedding_is_a_layer:
        places = split_layers(num_layers + 2, chunk_ranks)
        return tuple(len(p) - (p.start == 0) - (p.stop == num_layers + 2) for p in places)
    if practice.ceil_split:
        each = -(-num_layers // len(chunk_ranks))
        return tuple(max(0, min(each, num_layers - i * each)) for i in range(len(chunk_ranks)))
    return tuple(len(p) for p in split_layers(num_layers, chunk_ranks))


class Pricing:
    """Prices one resolved job on one machine, as one practice carries it out: hpcpar's own, if none is given."""

    def __init__(self, job: Job, machine: Machine, practice: Practice | None = None):
        wish, train = job.layout, job.train
        self.node = Node(min(job.world_size, job.machine.gpus_per_node), machine.chip.cores)
        self.job, self.whole = job, machine
        self.practice = practice or trainer(job, on_gpu=not machine.is_cpu)
        self.machine = as_rank_sees(machine, self.node)
        self.dp = required(wish.dp)
        self.num_microbatches = train.global_batch // (self.dp * train.microbatch)
        self.cut = Cut(job.model, train.microbatch, wish.tp, wish.cp, wish.cuts_sequence,
                       train.precision, wish.tp_pieces, splits_backward(wish))
        inner = (wish.num_shards if wish.zero_stage else self.dp) * wish.cp
        self.dp_ring = ring(machine, inner, wish.tp)
        self.across_ring = ring(machine, self.dp * wish.cp // inner, wish.tp * inner)  # hybrid: who owns the same
        self.own = parse_table(wish, self.num_microbatches) if wish.schedule == "table" else None  # a user's schedule
        self.chunk_ranks = self.own.chunk_ranks if self.own else place_chunks(wish.schedule, wish.pp, wish.chunks)
        self.layers = chunk_layers(job.model.layers, self.chunk_ranks, self.practice)

    @cached_property
    def chunks_by_rank(self) -> list[list[int]]:
        """The chunks that each pipeline rank holds."""
        mine: list[list[int]] = [[] for _ in range(self.job.layout.pp)]
        for chunk, rank in enumerate(self.chunk_ranks):
            mine[rank].append(chunk)
        return mine

    @cached_property
    def counts(self) -> Counts:
        """Elements of a tp rank."""
        return rank_counts(self.job.model, self.job.layout.tp)

    @cached_property
    def chunks(self) -> list[ChunkTime]:
        """Each chunk's time for one microbatch, in the network's order."""
        last = len(self.layers) - 1
        known: dict[tuple[int, bool, bool], ChunkTime] = {}
        for i, num in enumerate(self.layers):
            if (num, i == 0, i == last) not in known:
                known[num, i == 0, i == last] = self._chunk(num, i == 0, i == last)
        return [known[num, i == 0, i == last] for i, num in enumerate(self.layers)]

    def _chunk(self, num_layers: int, first: bool, last: bool) -> ChunkTime:
        layer = layer_time(self.cut, self.machine, self.practice, self.job.layout.recompute)
        forward = Seconds().plus(layer.forward, num_layers)
        backward = Seconds().plus(layer.backward.plus(layer.again), num_layers)
        if self.offloads:
            copied = layer_bytes(self.job, "none", self.practice)
            out, back = (copied_s(self.machine, copied, beside.total) for beside in (layer.forward, layer.backward))
            hidden = max(0, num_layers - 1)
            forward = forward.plus(Seconds(host=hidden * out))
            # the last layer leaves, and comes back, beside nothing, unless its backward follows at once
            stays = last and self.job.layout.schedule in ("1f1b", "interleaved")
            backward = backward.plus(Seconds(host=hidden * back + (not stays) * copied_s(self.machine, copied, 0.0)))
        if first or last:
            look_up, scatter, head, head_back = ends_time(self.cut, self.machine, self.practice)
            if first:
                forward, backward = forward.plus(look_up), backward.plus(scatter)
            if last:
                forward, backward = forward.plus(head), backward.plus(head_back)
        accumulated = self.practice.accumulate_bytes * self.counts.stage(num_layers, first, last)
        backward = backward.plus(Seconds(elementwise=accumulated / self.machine.chip.bytes_per_s))
        if self.job.layout.zero_stage == 3 and self.dp_ring.size > 1:
            element = ELEMENT_BYTES[self.cut.precision]
            gather = num_layers * gather_s(self.machine, self.dp_ring, element * self.counts.layer)
            reduce = num_layers * gather_s(self.machine, self.dp_ring, self._grad_bytes * self.counts.layer)
            forward = forward.plus(Seconds(data=_exposed(gather, forward.total)))
            backward = backward.plus(Seconds(data=_exposed(gather + reduce, backward.total)))
        if self.job.layout.pp > 1:
            # where cores are shared, a message that nobody waits for is still copied by one of them
            held_up = 2 if self.node.cores else self.practice.blocking_messages / 2
            activation_s, gradient_s = self.boundaries_s
            forward = forward.plus(Seconds(pipeline=held_up * activation_s))
            backward = backward.plus(Seconds(pipeline=held_up * gradient_s))
        return ChunkTime(forward, backward)

    @property
    def offloads(self) -> bool:
        """Whether activations wait in the host's memory."""
        return self.job.layout.recompute == "offload"

    @property
    def _grad_bytes(self) -> int:
        return self.practice.grad_bytes if self.cut.element == 2 else self.cut.element

    @property
    def boundary_s(self) -> float:
        """A message between neighbouring pipeline ranks, of either kind."""
        return sum(self.boundaries_s) / 2

    @cached_property
    def boundaries_s(self) -> tuple[float, float]:
        """A message of activations, and one of their gradients, between neighbouring pipeline ranks."""
        cut, wish, practice = self.cut, self.job.layout, self.practice
        num_bytes = cut.tokens * cut.model.hidden * cut.element
        # neighbours are tp x cp x dp ranks apart
        inside = wish.pp * wish.tp * wish.cp * self.dp <= self.machine.inside.devices
        whole = message_s(self.machine, num_bytes, inside)
        part = message_s(self.machine, num_bytes / cut.tp, inside)
        if cut.sequence_parallel:
            return part, part
        part += gather_s(self.machine, ring(self.machine, cut.tp, 1), num_bytes)
        return part if practice.scatters_activations else whole, part if practice.scatters_gradients else whole

    def rank_numel(self, rank: int) -> int:
        """Elements that a rank holds; a tied embedding once, even where the first and the last chunk meet."""
        mine, last = self.chunks_by_rank[rank], len(self.layers) - 1
        return self.counts.stage(sum(self.layers[c] for c in mine), 0 in mine, last in mine)

    def step(self, quick: bool = False) -> StepTime:
        """Price the whole step; `quick` takes 1F1B's closed form and the bubble by formula for the others."""
        wish, m, chunks = self.job.layout, self.num_microbatches, self.chunks
        both = [c.total for c in chunks]
        work = [m * sum(both[c] for c in mine) for mine in self.chunks_by_rank]
        busiest = max(range(wish.pp), key=work.__getitem__)
        length = self._quick_pipeline_s(work) if quick else self._pipeline_s()
        # cores that are shared do the work of all ranks: its mean counts, not the busiest's
        counted = range(len(chunks)) if self.node.cores else self.chunks_by_rank[busiest]
        times = m * self.node.crowd / (wish.pp if self.node.cores else 1)
        kinds = Seconds()
        for c in counted:
            kinds = kinds.plus(chunks[c].forward, times).plus(chunks[c].backward, times)
        exposed, hidden, gathered = self._data_s(busiest)
        parts = dict(kinds._asdict())
        parts["data"] += (exposed + gathered) * self.node.crowd
        parts |= {"bubble": length - kinds.total, "tied": self._tied_s(),
                  "optimizer": self.update_s(busiest) * self.node.crowd}
        return StepTime(sum(parts.values()), parts["bubble"] / kinds.total, parts, {"data": hidden})

    def _pipeline_s(self) -> float:
        wish = self.job.layout
        forward, backward = [c.forward.total for c in self.chunks], [c.backward.total for c in self.chunks]
        message_s = self.boundary_s if wish.pp > 1 else 0.0

        def play_all(schedule: Schedule) -> float:
            if self.node.cores:
                return shared_length_s(schedule, forward, backward, wish.tp * wish.cp * self.dp, self.node)
            return length_s(schedule, forward, backward, message_s)

        if self.own:
            return play_all(self.own)
        if self.node.cores:
            return played_s(wish.schedule, wish.pp, self.num_microbatches, wish.chunks, play_all)
        return pipeline_s(wish.schedule, wish.pp, self.num_microbatches, wish.chunks, forward, backward, message_s)

    def _quick_pipeline_s(self, work: list[float]) -> float:
        """The length within a few per cent, for comparing thousands of layouts."""
        wish, m = self.job.layout, self.num_microbatches
        if self.node.cores:  # the cores' work, or the longest way through the pipeline
            way = sum(work) / wish.pp * (m + wish.pp - 1) / m
            return max(self.node.crowd * sum(work) / wish.pp, way)
        if wish.pp == 1:
            return work[0]
        if wish.chunks == 1 and wish.schedule in ("1f1b", "gpipe"):
            return steady_step_s([c.forward.total for c in self.chunks], [c.backward.total for c in self.chunks], m,
                                 self.boundary_s)
        fill = (wish.pp - 1) / wish.chunks * sum(work) / wish.pp / m
        if wish.schedule in ("zero-bubble", "zbv", "dualpipev"):
            fill /= 3 if wish.schedule == "zero-bubble" else 6
        return max(work) + fill + 2 * (wish.pp - 1) * self.boundary_s

    def _data_s(self, rank: int) -> tuple[float, float, float]:
        """Sum of gradients over dp (exposed, hidden), and the gathering of new weights."""
        group, stage, numel = self.dp_ring, self.job.layout.zero_stage, self.rank_numel(rank)
        if group.size == 1:
            return 0.0, 0.0, 0.0
        reduce = 0.0 if stage == 3 else gather_s(self.machine, group, numel * self._grad_bytes)
        gather = gather_s(self.machine, group, numel * ELEMENT_BYTES[self.cut.precision])
        if stage == 0 or self.practice.reduces_whole:
            reduce *= 2
        if stage == 2:  # a rank keeps only its shard between microbatches, so that each of them is reduced
            reduce *= self.num_microbatches
        reduce += reduce_s(self.machine, self.across_ring, numel / group.size * self._grad_bytes)
        hidden = 0.0
        if self.practice.overlaps_reduction and not self.node.cores:
            backward = sum(self.chunks[c].backward.total for c in self.chunks_by_rank[rank])
            hidden = min(reduce, (1 - TAIL) * backward * (self.num_microbatches if stage == 2 else 1))
        return reduce - hidden + BESIDE * hidden, hidden, gather if stage in (1, 2) else 0.0

    def update_s(self, rank: int) -> float:
        """Norm, clipping and AdamW on the owned shard."""
        owned = self.rank_numel(rank) / (self.dp_ring.size if self.job.layout.zero_stage else 1)
        chip = self.machine.chip
        return self.practice.adam_traffic * owned / chip.bytes_per_s + 100 * chip.launch_us * 1e-6

    def _tied_s(self) -> float:
        """The gradient of an embedding tied across the first and the last stage."""
        if self.chunk_ranks[0] == self.chunk_ranks[-1] or not self.job.model.tied:
            return 0.0
        return message_s(self.machine, self.counts.token_embedding * self._grad_bytes, inside=False)

    def memory(self, numel: list[int] | None = None) -> list[Memory]:
        """Return each pipeline rank's memory; `numel` are the exact lengths of its buckets, where they are at hand."""
        return [self.rank_memory(rank, numel[rank] if numel else None) for rank in range(self.job.layout.pp)]

    def rank_memory(self, rank: int, numel: int | None = None) -> Memory:
        """Return a pipeline rank's memory."""
        mine, last = self.chunks_by_rank[rank], len(self.layers) - 1
        memory = stage_memory(self.job, sum(self.layers[c] for c in mine), numel or self.rank_numel(rank),
                              self._in_flight(rank), 0 in mine, last in mine, self.practice)
        if self.machine.is_cpu:  # its own memory is the host's
            memory = replace(memory, activations=memory.activations + self._offloaded_bytes(rank))
        return memory

    def rank_host_bytes(self, rank: int) -> float:
        """Return what of a pipeline rank's activations waits in the host's memory, where that is not the device's."""
        return 0.0 if self.machine.is_cpu else self._offloaded_bytes(rank)

    def _offloaded_bytes(self, rank: int) -> float:
        if not self.offloads:
            return 0.0
        mine = self.chunks_by_rank[rank]
        layers = sum(self.layers[c] for c in mine) * layer_bytes(self.job, "none", self.practice)
        return self._in_flight(rank) * (layers - inputs_bytes(self.job, first=0 in mine))

    @cached_property
    def host_bytes(self) -> float:
        """The most that waits in the host's memory for a rank (`layout.recompute = "offload"`)."""
        return max(self.rank_host_bytes(rank) for rank in range(self.job.layout.pp))

    @property
    def host_fits(self) -> bool:
        """Whether that is no more than a device's share of the host's memory, if the machine says what that is."""
        return not self.machine.host.share_gib or self.host_bytes <= self.machine.host.share_gib * 2**30

    def _in_flight(self, rank: int) -> float:
        """Microbatches of which a rank keeps activations, in whole stages' worth."""
        wish = self.job.layout
        if self.own:
            return in_flight(self.own.orders[rank]) / wish.chunks
        return held(wish.schedule, wish.pp, self.num_microbatches, wish.chunks)[rank]

    def least_memory_bytes(self) -> float:
        """Return the most of the first two and the last rank: one of them is the fullest, or near it."""
        ranks = {0, min(1, self.job.layout.pp - 1), self.job.layout.pp - 1}
        return max(self.rank_memory(rank).total for rank in ranks)


def _exposed(exchange: float, beside: float) -> float:
    """What an exchange adds to computation that it runs beside."""
    return max(0.0, exchange - beside) + BESIDE * min(exchange, beside)
