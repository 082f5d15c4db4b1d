"""A wish made complete and checked, before any rank or communicator exists."""

from __future__ import annotations

import math
from pathlib import Path

from hpcpar.config.job import Job, LayoutWish, required
from hpcpar.config.load import override
from hpcpar.errors import UserError


def resolve(job: Job, world_size: int | None = None, on_paper: bool = False) -> Job:
    """Return `job` with every derived value filled in, or raise UserError with field, rule and nearest fix.

    `world_size` is the number of ranks started; None (show, submit) takes it from dp, else from [machine].
    `on_paper`: the planner also prices layouts that no rank can run yet.
    """
    model, layout = job.model, job.layout
    kv_heads = model.kv_heads or model.heads
    ffn = model.ffn or (4 * model.hidden if model.kind == "gpt" else -(-8 * model.hidden // (3 * 64)) * 64)
    replica = layout.tp * layout.pp * layout.cp
    if layout.dp is None and world_size is None:
        on_machine = job.machine.nodes * job.machine.gpus_per_node
        world_size = on_machine if job.machine.gpu != "cpu" else replica
    dp = layout.dp or max(1, required(world_size) // replica)
    decay_steps = job.train.steps if job.optim.decay_steps is None else job.optim.decay_steps
    job = override(job, model={"kv_heads": kv_heads, "ffn": ffn}, layout={"dp": dp},
                   optim={"decay_steps": decay_steps})
    if isinstance(layout.table, str):
        job = override(job, layout={"table": _read_lines("layout.table", layout.table)})
    if not on_paper:
        _check_runs(job)
    _check_model(job)
    _check_cuts(job)
    _check_schedule(job)
    _check_world(job, world_size)
    _check_batch(job)
    _check_zero(job)
    _check_optim(job)
    return job


def _require(holds: bool, where: str, rule: str, fix: str) -> None:
    if not holds:
        raise UserError(where, rule, fix)


def nearest(wanted: int, legal: list[int]) -> str:
    """Name the legal values around `wanted`: "nearest legal: 4 or 8"."""
    below = [v for v in legal if v < wanted][-1:]
    above = [v for v in legal if v > wanted][:1]
    return "nearest legal: " + " or ".join(map(str, below + above))


def _divisors(*numbers: int) -> list[int]:
    common = math.gcd(*numbers)
    low = [d for d in range(1, math.isqrt(common) + 1) if common % d == 0]
    return sorted({*low, *(common // d for d in low)})


def _check_runs(job: Job) -> None:
    """Refuse what the planner can price and the trainer cannot run."""
    for name in ("cp", "ep"):
        value = getattr(job.layout, name)
        _require(value <= 1, f"layout.{name}", f"is {value}, but this version only runs {name} = 1",
                 f"write {name} = 1")


def _check_model(job: Job) -> None:
    model, kv_heads = job.model, required(job.model.kv_heads)
    _require(model.hidden % model.heads == 0, "model.heads",
             f"{model.heads} does not divide model.hidden = {model.hidden}",
             nearest(model.heads, _divisors(model.hidden)))
    _require(kv_heads <= model.heads and model.heads % kv_heads == 0, "model.kv_heads",
             f"{kv_heads} does not divide model.heads = {model.heads}", nearest(kv_heads, _divisors(model.heads)))
    if model.kind == "llama":
        _require(job.head_dim % 2 == 0, "model.heads", f"rotary positions need an even head_dim, not {job.head_dim}",
                 nearest(model.heads, [d for d in _divisors(model.hidden) if model.hidden // d % 2 == 0])
                 if model.hidden % 2 == 0 else "choose an even model.hidden")
    _require(model.dropout < 1, "model.dropout", f"is {model.dropout}, must be below 1", "write 0.1")


def _check_cuts(job: Job) -> None:
    model, layout, tp = job.model, job.layout, job.layout.tp
    kv_heads, ffn = required(model.kv_heads), required(model.ffn)
    legal = [t for t in _divisors(model.heads, ffn) if kv_heads % t == 0 or t % kv_heads == 0]
    _require(tp in legal, "layout.tp", f"{tp} must divide model.heads = {model.heads} and model.ffn = {ffn}"
             + ("" if kv_heads == model.heads else f", and divide model.kv_heads = {kv_heads} or be a multiple of it"),
             nearest(tp, legal))
    _require(model.vocab >= tp, "model.vocab", f"{model.vocab} is fewer rows than layout.tp = {tp}",
             f"write vocab = {tp} or more")
    unit = tp * layout.cp
    _require(not layout.sequence_parallel or model.seq % unit == 0, "model.seq", "sequence parallelism needs seq "
             f"divisible by layout.tp = {tp}{f' x layout.cp = {layout.cp}' if layout.cp > 1 else ''}, not {model.seq}",
             f"write seq = {max(1, model.seq // unit) * unit}, or --layout.sequence_parallel false")
    own = model.seq // unit
    _require(layout.tp_overlap == 1 or tp == 1 or layout.sequence_parallel, "layout.tp_overlap", f"is "
             f"{layout.tp_overlap}, but without sequence parallelism an exchange cannot be cut into pieces",
             "write sequence_parallel = true, or tp_overlap = 1")
    _require(tp == 1 or own % layout.tp_overlap == 0, "layout.tp_overlap", f"{layout.tp_overlap} pieces of a rank's "
             f"{own} tokens are not equally long", nearest(layout.tp_overlap, _divisors(own)))
    _require(layout.ep == 1, "layout.ep", f"is {layout.ep}, but the model has no experts", "write ep = 1")
    _require(model.seq % layout.cp == 0, "layout.cp", f"{layout.cp} does not divide model.seq = {model.seq}",
             nearest(layout.cp, _divisors(model.seq)))
    _require(layout.pp <= model.layers, "layout.pp", f"{layout.pp} stages for model.layers = {model.layers}: "
             "every stage needs a layer", f"nearest legal: {model.layers}")
    _require(layout.pp * layout.chunks <= model.layers, "layout.chunks", f"{layout.chunks} x layout.pp = {layout.pp} "
             f"chunks for model.layers = {model.layers}: every chunk needs a layer",
             f"nearest legal: {model.layers // layout.pp}")


def _check_schedule(job: Job) -> None:
    layout = job.layout
    name, chunks = layout.schedule, layout.chunks
    _require(name not in ("pipedream", "2bw"), "layout.schedule", f'"{name}" computes gradients with old weights: it '
             "is on paper only, no rank plays it", "choose another, and see it by hpcpar show JOB --schedule " + name)
    _require(name == "table" or not layout.table, "layout.table", f"is given, but layout.schedule is {name}",
             'write schedule = "table"')
    _require(name != "table" or len(layout.table) > 0, "layout.table", "is empty, but layout.schedule is table",
             "give a file, or a line of actions for each pipeline rank")
    low, high = {"interleaved": (2, None), "zbv": (2, 2), "dualpipev": (2, 2), "gpipe": (1, 1),
                 "1f1b": (1, 1)}.get(name, (1, None))
    _require(chunks >= low and (high is None or chunks <= high), "layout.chunks",
             f"is {chunks}, but {name} has {low if high else f'{low} or more'} a rank", f"write chunks = {low}")
    _require(not (splits_backward(layout) and layout.recompute == "offload"), "layout.recompute", f'is "offload", but '
             f"{name} keeps a layer's inputs on the device between I and W", 'write recompute = "full", or schedule = '
             "1f1b")
    _require(not (splits_backward(layout) and job.train.compile), "train.compile", f"does not go with {name}, which "
             "splits backwards in two", "write compile = false, or schedule = 1f1b")


def compiles(job: Job, on_gpu: bool) -> bool:
    """Whether layers are compiled: where it is wished, else on GPUs in 16 bits, if the schedule lets it."""
    if job.train.compile is None:
        return on_gpu and job.train.precision in ("bf16", "fp16") and not splits_backward(job.layout)
    return job.train.compile


def splits_backward(layout: LayoutWish) -> bool:
    """Whether a schedule has backwards of input and weights apart."""
    own = any("W" in line for line in layout.table)
    return layout.schedule in ("zero-bubble", "zbv", "dualpipev") or own


def _read_lines(where: str, path: str) -> tuple[str, ...]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise UserError(where, f"cannot read {path}: {reason}", "give the path of a text file") from None
    return tuple(line for line in text.splitlines() if line.strip())


def _check_world(job: Job, world_size: int | None) -> None:
    layout, size = job.layout, job.world_size
    if world_size is None or size == world_size:
        return
    replica = layout.tp * layout.pp * layout.cp
    started = "1 rank was started" if world_size == 1 else f"{world_size} ranks were started"
    fix = f"start {size} ranks (mpirun -n {size} ...)"
    if world_size % replica == 0:
        fix += f", or give --layout.dp {world_size // replica}"
    elif world_size < replica:
        fix += f", or choose tp x pp of at most {world_size}"
    else:
        fix += f", or a multiple of tp x pp = {replica}"
    raise UserError("layout", f"tp {layout.tp} x pp {layout.pp} x dp {layout.dp} = {size}, but {started}", fix)


def _check_batch(job: Job) -> None:
    train, layout, dp = job.train, job.layout, required(job.layout.dp)
    unit = dp * train.microbatch
    rule = f"must be a multiple of layout.dp x train.microbatch = {dp} x {train.microbatch}"
    if layout.schedule == "interleaved" or (layout.schedule == "zero-bubble" and layout.chunks > 1):
        unit *= layout.pp
        rule += f" x layout.pp = {layout.pp} (chunks take microbatches in rounds of pp)"
    rule += f" = {unit}"
    least = unit * 2 * layout.pp if layout.schedule == "dualpipev" else unit
    batch = train.global_batch
    _require(batch % unit == 0, "train.global_batch", f"{batch} {rule}", nearest(batch, _around(batch, unit)))
    _require(batch >= least, "train.global_batch", f"{batch} are fewer than the 2 x layout.pp = {2 * layout.pp} "
             f"microbatches a replica that {layout.schedule} needs", f"nearest legal: {least}")
    if job.optim.ramp is not None:
        start, increment, samples = job.optim.ramp
        whole = 0 < start <= batch and increment > 0 and samples >= 0 and (batch - start) % increment == 0
        _require(whole, "optim.ramp",
                 f"{list(job.optim.ramp)} must go from start to global_batch = {batch} in whole increments",
                 f"for example [{least}, {unit}, {10 * batch}]")
        for name, value in (("start", start), ("increment", increment)):
            _require(value % unit == 0, "optim.ramp", f"its {name} {value} {rule}",
                     nearest(value, _around(value, unit)))
        _require(start >= least, "optim.ramp", f"starts with {start}, fewer than {layout.schedule} needs",
                 f"nearest legal start: {least}")
        _require(layout.schedule != "table", "optim.ramp", "changes the microbatches of a step, a table does not",
                 "leave the ramp out, or choose a schedule by name")


def _check_zero(job: Job) -> None:
    if isinstance(job.layout.zero, tuple):
        (stage, over), dp = job.layout.zero, required(job.layout.dp)
        legal = [n for n in _divisors(dp) if n > 1]
        _require(over in legal, "layout.zero", f"[{stage}, {over}] shards over {over} of layout.dp = {dp} ranks: must "
                 f"be 2 or more and divide dp", nearest(over, legal) if legal else "write zero = 0")


def _around(value: int, unit: int) -> list[int]:
    below = value // unit * unit
    return [v for v in (below, below + unit) if v]


def _check_optim(job: Job) -> None:
    optim, data = job.optim, job.data
    _require(all(0 <= b < 1 for b in optim.betas), "optim.betas", f"{list(optim.betas)} must lie in [0, 1)",
             "write [0.9, 0.95]")
    _require(optim.min_lr <= optim.lr, "optim.min_lr", f"{optim.min_lr} is above optim.lr = {optim.lr}",
             f"write min_lr = {optim.lr / 10:g}")
    _require(data.validation < 1, "data.validation", f"is {data.validation}, must be below 1", "write 0.01")
    _require(job.checkpoint.ranks_per_file <= job.world_size, "checkpoint.ranks_per_file",
             f"is {job.checkpoint.ranks_per_file}, more than the {job.world_size} ranks", f"write {job.world_size}")
    _require(job.checkpoint.asynchronous != "neighbour" or job.checkpoint.ranks_per_file == 1,
             "checkpoint.ranks_per_file", f"is {job.checkpoint.ranks_per_file} with asynchronous = neighbour, which "
             "keeps each rank's file apart", "write ranks_per_file = 1")
    _require(job.checkpoint.compression == "none" or job.checkpoint.ranks_per_file == 1, "checkpoint.compression",
             f"is {job.checkpoint.compression} with {job.checkpoint.ranks_per_file} ranks a file, which must know the "
             "sizes beforehand", "write ranks_per_file = 1")
