"""How a piece of software carries a step out, as plain facts: what the planner must know besides shapes and machine.

`trainer` is hpcpar itself. Other values describe published systems, so that the same planner can be held against their
measurements (benchmarks/planner_accuracy.py). Nothing here is fitted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hpcpar.config.job import Job
from hpcpar.config.resolve import compiles


@dataclass(frozen=True)
class Practice:
    """Facts about a trainer's way of working; sizes in bytes are per element."""

    flash: int = 2  # version of the fused attention that never writes the scores; 0: they go through memory
    fused: bool = False  # elementwise neighbours share a kernel (hand-written or compiled)
    plain_norms: bool = False  # a norm is a chain of wide elementwise operations, not one kernel
    packed_projections: bool = False  # q, k, v (and gate, up) are one product each
    dropout: bool = False  # masks are kept and applied after attention and MLP
    keeps_gathered: bool = True  # sequence parallelism keeps the gathered input; else it is gathered again in backward
    reorders_gathered: bool = False  # and copies it from ranks' order into the sequence's, with several in a microbatch
    stops_early: bool = True  # full recomputation leaves out the layer's last exchange
    recomputes_projections: bool = True  # "selective" repeats all of attention; False: without its products
    keeps_half_the_products: bool = False  # "selective" keeps every other product's result and the attention's instead
    grad_bytes: int = 4  # of a gradient as it is accumulated and reduced
    keeps_both_grads: bool = False  # those in 16 bits live on beside the accumulated ones
    copies_owned_grads: bool = False  # the update works on an fp32 copy of the owned gradients
    bucket_bytes: float = 0.0  # of buffers through which gradients and weights pass when they are exchanged
    accumulate_bytes: int = 10  # memory traffic of adding one gradient element into the accumulated one
    gathers_weights: int = 2  # of a weight as it is gathered over dp
    reduces_whole: bool = False  # ZeRO-1 all-reduces whole gradients where a reduce-scatter would do
    overlaps_reduction: bool = True  # the sum over dp runs beside the step's last backward
    overlaps_tensor: bool = False  # exchanges of tensor parallelism run beside products
    scatters_activations: bool = False  # a stage boundary is crossed by 1/tp of them on each rank, gathered inside
    scatters_gradients: bool = False  # the same of their gradients
    blocking_messages: int = 0  # of a microbatch's four messages, how many a stage stands still for
    blocking_launches: bool = False  # every kernel is waited for before the next one is started
    embedding_is_a_layer: bool = False  # embedding and logits take a layer's place in the cut into stages
    ceil_split: bool = False  # spare layers: every stage gets the rounded-up number, the last what is left
    chunked_loss: bool = False  # logits stand in memory a chunk of tokens at a time (layout/loss.py)
    logits_bytes: int = 14  # memory held for a logit at the peak of a loss that is not chunked
    adam_traffic: int = 46  # bytes read and written a owned element by the update


TRAINER = Practice(chunked_loss=True)


def trainer(job: Job, on_gpu: bool) -> Practice:
    """Return how hpcpar carries a job out: with compiled layers or without, exchanges over tp apart from products or
    one with them.
    """
    whole = job.layout.tp_pieces == 1
    return replace(TRAINER, fused=compiles(job, on_gpu), stops_early=whole, recomputes_projections=whole)
