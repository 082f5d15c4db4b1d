"""Memory of a rank, by category, in bytes.

Weights, gradients and optimizer state are exact (the buckets' own lengths); activations are what autograd keeps.
Source of the activation counts: Korthikanti et al. 2022, arXiv 2205.05198, section 4; what hpcpar's network keeps
differs where `practice` says so.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hpcpar.config.job import Job, Model, required
from hpcpar.layout.loss import loss_chunks
from hpcpar.planner.params import rank_counts
from hpcpar.planner.practice import TRAINER, Practice

ELEMENT_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
LENT_BUCKETS = 3  # ZeRO 2 and 3: whole ones of gradients at a time, one that is filled and two being summed over dp
OFFLOADED_HERE = 2  # layers whose activations are on the device: the one computed, and the one being copied
FRAGMENTATION = 0.04  # of what is allocated and freed within a step: the caching allocator's unused ends


@dataclass(frozen=True)
class Memory:
    """A rank's device memory, bytes by category."""

    weights: float = 0.0
    gradients: float = 0.0
    master: float = 0.0
    moments: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    buffers: float = 0.0
    fragmentation: float = 0.0

    @property
    def total(self) -> float:
        """All categories together."""
        return float(sum(dataclasses.astuple(self)))

    @property
    def states(self) -> float:
        """What a rank holds between steps: weights, gradients, optimizer state."""
        return self.weights + self.gradients + self.master + self.moments


def state_memory(numel: int, num_shards: int, zero: int, precision: str, practice: Practice = TRAINER) -> Memory:
    """Return the state bytes of a rank with `numel` local elements, padding included.

    Mixed precision: 2 + gradient + 4 + 8 bytes; fp32 and fp64 keep no second copy of the weights.
    Source: Rajbhandari et al. 2020, arXiv 1910.02054, sections 3 and 5.
    """
    element = ELEMENT_BYTES[precision]
    mixed = element == 2
    main = 4 if mixed else element
    owned = numel / (num_shards if zero else 1)
    return Memory(
        weights=element * (owned if zero == 3 else numel),
        gradients=(practice.grad_bytes if mixed else main) * (owned if zero >= 2 else numel)
        + (main * owned if practice.copies_owned_grads else 0)
        + (element * numel if practice.keeps_both_grads else 0),
        master=main * owned if mixed else 0.0,
        moments=2 * main * owned,
    )


def layer_activation_bytes(model: Model, tp: int, sequence_parallel: bool, microbatch: int, recompute: str,
                           precision: str = "bf16", practice: Practice = TRAINER) -> float:
    """Return what one layer keeps of one microbatch for backward."""
    element, tokens, hidden = ELEMENT_BYTES[precision], microbatch * model.seq, model.hidden
    shard = tp if sequence_parallel else 1
    if recompute == "full":
        return element * tokens * hidden / shard
    kv = required(model.kv_heads) / model.heads
    inside = required(model.ffn) / hidden * (2 if model.kind == "gpt" else 3 if practice.fused else 4)
    gathered = 1 if practice.keeps_gathered or not sequence_parallel else tp
    attention = (2 + 2 * kv + (practice.fused and model.kind == "llama")) / tp  # there the compiler keeps one more
    scores = 0.0 if practice.flash else model.heads * model.seq / hidden / tp
    if recompute == "selective" and practice.keeps_half_the_products:
        products = 2 + 2 * kv + 1 + required(model.ffn) / hidden * (1 if model.kind == "gpt" else 2)
        return element * tokens * hidden * (1 / shard + (1 + products / 2) / tp)
    if recompute == "selective":
        attention, scores = (0.0 if practice.recomputes_projections else attention), 0.0
    kept = element * (2 / shard + 2 / gathered + attention + inside / tp)
    kept += scores * (2 * element + (1 if practice.dropout else 0)) if practice.dropout else scores * element
    kept += 2 / shard if practice.dropout else 0.0
    statistics = 4 * model.heads / hidden / tp if practice.flash and recompute == "none" else 0.0
    return tokens * hidden * (kept + statistics)


def layer_bytes(job: Job, recompute: str, practice: Practice = TRAINER) -> float:
    """Return what a layer of a resolved job would keep of one microbatch, if it recomputed `recompute`."""
    model, wish, train = job.model, job.layout, job.train
    seq_cut = dataclasses.replace(model, seq=-(-model.seq // wish.cp)) if wish.cp > 1 else model
    return layer_activation_bytes(seq_cut, wish.tp, wish.cuts_sequence, train.microbatch, recompute, train.precision,
                                  practice)


def inputs_bytes(job: Job, first: bool) -> float:
    """Return what a rank's chunks get of one microbatch from other chunks: the pipeline holds it until backward."""
    return (job.layout.chunks - first) * _message(job)


def _message(job: Job) -> float:
    """Return the bytes of a microbatch's activations that a rank hands on to the next stage."""
    return _full_width(job) / (job.layout.tp if job.layout.cuts_sequence else 1)


def _full_width(job: Job) -> int:
    """Return the bytes of a microbatch's activations [batch, seq/cp, hidden] where tp does not cut them."""
    train = job.train
    return ELEMENT_BYTES[train.precision] * train.microbatch * -(-job.model.seq // job.layout.cp) * job.model.hidden


def logits_bytes(model: Model, tp: int, microbatch: int, practice: Practice = TRAINER,
                 precision: str = "bf16") -> float:
    """Return what the loss holds at its peak: the logits, wide ones, and their gradients.

    A chunked loss computes in place; 16-bit logits are widened, and narrowed again for the products.
    """
    rows = -(-model.vocab // (8 * tp)) * 8
    tokens, element = microbatch * model.seq, ELEMENT_BYTES[precision]
    if practice.chunked_loss:
        return float((element if element > 2 else 2 + 4 + 2) * max(loss_chunks(tokens, rows, element)) * rows)
    return float(practice.logits_bytes * tokens * rows)


def embedding_bytes(model: Model, tp: int, sequence_parallel: bool, microbatch: int,
                    practice: Practice = TRAINER) -> float:
    """Return what the embedding keeps of one microbatch: its token numbers, and dropout's mask.

    Source: Korthikanti et al. 2022, arXiv 2205.05198, section 4.3 (sbh a microbatch in flight).
    """
    mask = model.hidden / (tp if sequence_parallel else 1) if practice.dropout else 0.0
    return microbatch * model.seq * (8 + mask)


def stage_memory(job: Job, num_layers: int, numel: int, in_flight: float, first: bool, last: bool,
                 practice: Practice = TRAINER) -> Memory:
    """Return a rank's memory on a stage that holds `numel` elements and `in_flight` microbatches at most.

    `in_flight` counts whole stages' worth of activations (interleaving makes it a fraction).
    """
    model, wish, train = job.model, job.layout, job.train
    element = ELEMENT_BYTES[train.precision]
    sequence_parallel = wish.cuts_sequence
    seq_cut = dataclasses.replace(model, seq=-(-model.seq // wish.cp)) if wish.cp > 1 else model
    states = state_memory(numel, wish.num_shards * wish.cp, wish.zero_stage, train.precision, practice)

    full_width, message = _full_width(job), _message(job)
    logits = logits_bytes(seq_cut, wish.tp, train.microbatch, practice, train.precision) if last else 0.0
    whole = layer_bytes(job, "none", practice)
    if wish.recompute == "offload":
        activations = min(OFFLOADED_HERE, in_flight * num_layers) * whole + in_flight * inputs_bytes(job, first)
    else:
        kept = layer_bytes(job, wish.recompute, practice)
        # a layer's recomputation comes when the logits are gone: the larger of the two counts
        activations = in_flight * num_layers * kept + max(0.0, whole - kept - logits)
    if first:
        activations += in_flight * embedding_bytes(seq_cut, wish.tp, sequence_parallel, train.microbatch, practice)
    if last:
        activations += message + full_width  # the final norm's input, and the head's
    else:
        activations += in_flight * message  # a stage's output lives until its gradient is back
    buffers = (4.0 if wish.tp > 1 else 2.0) * full_width
    buffers += practice.bucket_bytes + (2 * message if wish.pp > 1 else 0)
    if wish.zero_stage >= 2 and wish.num_shards * wish.cp > 1:
        counts = rank_counts(model, wish.tp)
        ends = counts.token_embedding if first or last else 0.0
        # gradients before their reduction: the embedding's, and some buckets' (each a matrix at least, a layer at most)
        bucket = min(counts.layer, max(wish.bucket_mib * 2**20 / 4, model.hidden * required(model.ffn) / wish.tp))
        buffers += max(4, element) * (ends + LENT_BUCKETS * bucket)
        if wish.zero_stage == 3:  # gathered weights: of a layer, of the next, of the embedding
            buffers += element * (2 * counts.layer + ends)
    return dataclasses.replace(states, activations=activations, buffers=buffers, logits=logits,
                               fragmentation=FRAGMENTATION * (activations + buffers + logits))
