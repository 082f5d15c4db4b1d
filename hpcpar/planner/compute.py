"""How long a layer, the embedding and the logits take on one rank, forward and backward, from their shapes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from hpcpar.config.job import Model, required
from hpcpar.planner.hardware import Machine
from hpcpar.planner.kernels import fused_attention_s, moved_s, product_s
from hpcpar.planner.network import gather_s, ring
from hpcpar.planner.practice import Practice

BESIDE = 0.10  # of the time of an exchange that runs beside products: what it takes from their multiprocessors
BLOCKED_LAUNCH_S = 36e-6  # of a kernel that the host waits for: its end, the next operation in Python, its launch


class Seconds(NamedTuple):
    """Time by kind of kernel."""

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    tensor: float = 0.0  # exchanges of tensor parallelism
    context: float = 0.0  # exchanges of context parallelism
    pipeline: float = 0.0  # messages that a stage stands still for
    data: float = 0.0  # exchanges of data parallelism that nothing hides
    host: float = 0.0  # copies of activations to and from the host's memory that nothing hides

    def plus(self, other: Seconds, times: float = 1.0) -> Seconds:
        """Add `times` the other."""
        return Seconds(*(a + times * b for a, b in zip(self, other, strict=True)))

    @property
    def total(self) -> float:
        """All kinds."""
        return sum(self)

    @property
    def work(self) -> float:
        """What a rank does by itself."""
        return self.matmul + self.attention + self.elementwise


@dataclass(frozen=True)
class Cut:
    """What a rank works on at a time: one microbatch of a model cut by tp and cp."""

    model: Model
    microbatch: int
    tp: int
    cp: int
    sequence_parallel: bool
    precision: str
    pieces: int = 1  # of an exchange over tp
    puts_off: bool = False  # products for the weights' gradients, as a schedule with W does

    @property
    def seq(self) -> int:
        """Tokens of a sequence on a cp rank."""
        return -(-self.model.seq // self.cp)

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on a cp rank."""
        return self.microbatch * self.seq

    @property
    def element(self) -> int:
        """Bytes of an activation's element."""
        return {"fp64": 8, "fp32": 4}.get(self.precision, 2)


class LayerTime(NamedTuple):
    """One layer's work on one microbatch; `again` is what recomputation repeats in backward."""

    forward: Seconds
    backward: Seconds
    again: Seconds


class _Rank:
    """Prices kernels of one cut on one machine as one practice runs them."""

    def __init__(self, cut: Cut, machine: Machine, practice: Practice):
        self.cut, self.machine, self.practice = cut, machine, practice
        self.wide = cut.tokens * cut.model.hidden * cut.element  # bytes of [batch, seq, hidden]
        self.shard = cut.tp if cut.sequence_parallel else 1
        self.launch_s = BLOCKED_LAUNCH_S if practice.blocking_launches else machine.chip.launch_us * 1e-6

    def product(self, n: int, k: int, m: int | None = None, batch: int = 1) -> float:
        rows = self.cut.tokens if m is None else m
        return product_s(self.machine, rows, n, k, self.cut.precision, batch) + self.launch_s

    def in_pieces(self, n: int, k: int) -> float:
        """A product of a layer, with as many tokens at a time as a piece of an exchange over tp brings."""
        return self.cut.pieces * self.product(n, k, self.cut.tokens // self.cut.pieces)

    def linear_backward(self, n: int, k: int) -> float:
        """The input's gradient and the weight's."""
        return self.product(k, n) + self.product(k, self.cut.tokens, m=n)

    def moved(self, num_bytes: float, kernels: int = 1) -> float:
        return moved_s(self.machine, num_bytes, kernels, self.launch_s)

    def exchange(self, pieces: int = 1) -> float:
        """Half an all-reduce of [batch, seq, hidden] over tp: an all-gather or a reduce-scatter of it."""
        if self.cut.tp == 1:
            return 0.0
        seconds = pieces * gather_s(self.machine, ring(self.machine, self.cut.tp, 1), self.wide / pieces)
        if self.cut.sequence_parallel and self.cut.microbatch > 1 and self.practice.reorders_gathered:
            seconds += self.moved(2 * self.wide)  # [batch, seq] and [seq, batch] order: parts are copied into place
        return seconds

    def exposed(self, products: float, after: float = 0.0) -> float:
        """What a layer's exchange adds to the products that it is beside, piece by piece, and to those `after` them."""
        pieces = self.cut.pieces
        whole = self.exchange(pieces)
        if pieces == 1 or self.machine.is_cpu:  # there the cores that compute also copy
            return whole
        piece, beside = whole / pieces, products / pieces
        alone = max(0.0, piece + (pieces - 1) * max(piece, beside) + beside - products - after)
        return alone + BESIDE * (whole - alone)

    def projections(self) -> list[list[tuple[int, int]]]:
        """(out, in) of a layer's products on this rank but the attention's own, by what they lie beside: the exchange
        that enters attention, leaves it, enters the MLP, leaves it.
        """
        model, tp = self.cut.model, self.cut.tp
        hidden, ffn = model.hidden, required(model.ffn)
        kv = max(hidden // model.heads * required(model.kv_heads) // tp, hidden // model.heads)
        gates = 1 if model.kind == "gpt" else 2
        if self.practice.packed_projections:
            first, up = [(hidden // tp + 2 * kv, hidden)], [(gates * ffn // tp, hidden)]
        else:
            first, up = [(hidden // tp, hidden), (kv, hidden), (kv, hidden)], [(ffn // tp, hidden)] * gates
        return [first, [(hidden, hidden // tp)], up, [(hidden, ffn // tp)]]

    def core(self, backward: bool) -> float:
        """Scores and weighted sums."""
        model, cut = self.cut.model, self.cut
        heads, head_dim = model.heads / cut.tp, model.hidden // model.heads
        if self.practice.flash:
            kernels = 3 if backward else 1
            return fused_attention_s(self.machine, cut.tokens, model.seq, heads, head_dim, cut.precision,
                                     backward, self.practice.flash) + kernels * self.launch_s
        batch = max(1, int(cut.microbatch * heads))
        scores = self.product(model.seq, head_dim, m=cut.seq, batch=batch)
        sums = self.product(head_dim, model.seq, m=cut.seq, batch=batch)
        # forward: softmax reads and writes, dropout too with its mask; backward the same with one more read each
        passes = (3 * 2 + 2.5 * self.practice.dropout) if backward else (2 * 2 + 2.5 * self.practice.dropout)
        scores_bytes = batch * cut.seq * model.seq * cut.element
        return (2 if backward else 1) * (scores + sums) + self.moved(passes / 2 * scores_bytes, 2)


def _elementwise(rank: _Rank, backward: bool) -> float:
    """Return the seconds of what only moves memory: norms, residuals, biases, activation, rotation.

    Counted in passes (a read or a write) over a tensor as wide as `hidden`: (forward, backward) pairs below.
    """
    cut, practice, model = rank.cut, rank.practice, rank.cut.model
    gpt, fused = model.kind == "gpt", practice.fused
    ffn, kv = required(model.ffn) / model.hidden, required(model.kv_heads) / model.heads
    norm = (2, 3)[backward] * (5 if practice.plain_norms else 1)
    residual = 3 if fused or not gpt else 5  # with the bias before it
    mask = (0.5, 2.5)[backward] if practice.dropout else 0.0
    outside = 2 * (norm + residual + mask) / rank.shard
    if gpt:
        inside = ((2, 3)[backward] * ffn + 2) / cut.tp
        inside += (2 + (3 + ffn) / cut.tp) * backward  # gradients of biases
    else:
        activation = ((3, 5) if fused else (5, 9))[backward] * ffn
        inside = (activation + (1 + kv) * (2 if fused else 9) + 2) / cut.tp
    return rank.moved(rank.wide * (outside + inside), 6 if fused else 11 if gpt else 17)


@lru_cache(maxsize=4096)
def layer_time(cut: Cut, machine: Machine, practice: Practice, recompute: str) -> LayerTime:
    """Price one layer on one microbatch."""
    rank = _Rank(cut, machine, practice)
    shapes = rank.projections()
    products = [sum(rank.in_pieces(n, k) for n, k in part) for part in shapes]
    of_inputs = [sum(rank.in_pieces(k, n) for n, k in part) for part in shapes]
    of_weights = [sum(rank.product(k, cut.tokens, m=n) for n, k in part) for part in shapes]
    core, core_back = rank.core(False), rank.core(True)
    tensor = sum(rank.exposed(part) for part in products)
    # in backward a sum is under way beside the weights' gradients too, unless these are put off; a gathering is not
    after = (0.0,) * 4 if cut.puts_off else (of_weights[0], 0.0, of_weights[2], 0.0)
    tensor_back = sum(map(rank.exposed, of_inputs, after))
    context = _context_s(cut, machine)
    forward = Seconds(sum(products), core, _elementwise(rank, False), tensor, context)
    backward = Seconds(sum(of_inputs) + sum(of_weights), core_back, _elementwise(rank, True), tensor_back, 2 * context)
    if cut.sequence_parallel and cut.tp > 1 and not practice.keeps_gathered:
        backward = backward._replace(tensor=6 * rank.exchange())  # inputs gathered again for the weights' gradients
    if practice.overlaps_tensor:
        hidden = min(0.5 * (forward.tensor + backward.tensor), 0.5 * (forward.matmul + backward.matmul))
        share = 1 - hidden / max(forward.tensor + backward.tensor, 1e-12)
        forward = forward._replace(tensor=forward.tensor * share)
        backward = backward._replace(tensor=backward.tensor * share)
    again = Seconds()
    if recompute == "full":
        again = forward
        if practice.stops_early:
            again = forward._replace(tensor=(0.75 if cut.sequence_parallel else 0.5) * forward.tensor)
    elif recompute == "selective" and practice.keeps_half_the_products:
        again = Seconds(matmul=0.5 * forward.matmul, elementwise=forward.elementwise)
    elif recompute == "selective":
        again = Seconds(attention=core)
        if practice.recomputes_projections:
            again = again._replace(matmul=sum(products[:2]))
    return LayerTime(forward, backward, again)


def copied_s(machine: Machine, num_bytes: float, beside: float) -> float:
    """Return what a copy to or from the host adds to a layer's seconds that it runs `beside`."""
    if machine.is_cpu:  # there it is from memory to memory, and a core does it
        return 2 * num_bytes / machine.chip.bytes_per_s
    return max(0.0, num_bytes / machine.host.bytes_per_s - beside)


def _context_s(cut: Cut, machine: Machine) -> float:
    """Exchange keys and values over cp (ring attention), as far as the attention does not hide it: half is assumed."""
    if cut.cp == 1:
        return 0.0
    kv_bytes = 2 * cut.tokens * cut.model.hidden / cut.model.heads * required(cut.model.kv_heads) / cut.tp * cut.element
    return 0.5 * gather_s(machine, ring(machine, cut.cp, cut.tp), kv_bytes * cut.cp)


@lru_cache(maxsize=4096)
def ends_time(cut: Cut, machine: Machine, practice: Practice) -> tuple[Seconds, Seconds, Seconds, Seconds]:
    """Price what the first and the last stage do besides layers: (embedding, its backward, logits, their backward)."""
    rank = _Rank(cut, machine, practice)
    rows = -(-cut.model.vocab // (8 * cut.tp)) * 8
    look_up = Seconds(elementwise=rank.moved(3 * rank.wide, 4), tensor=rank.exchange() * (1 if rank.shard > 1 else 2))
    scatter = Seconds(elementwise=rank.moved(3 * rank.wide + 4 * rows * cut.model.hidden, 2),
                      tensor=rank.exchange() if rank.shard > 1 else 0.0)
    logits = cut.tokens * rows
    head = Seconds(matmul=rank.product(rows, cut.model.hidden), tensor=rank.exchange() if rank.shard > 1 else 0.0,
                   elementwise=rank.moved(10 * logits + 2 * rank.wide / rank.shard, 6))
    head_back = Seconds(matmul=rank.linear_backward(rows, cut.model.hidden),
                        elementwise=rank.moved(22 * logits + 3 * rank.wide / rank.shard, 6),
                        tensor=rank.exchange() * (1 if rank.shard > 1 else 2))
    return look_up, scatter, head, head_back
