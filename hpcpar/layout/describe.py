"""A layout in words: what `hpcpar show JOB` prints, with no rank started."""

from __future__ import annotations

from hpcpar.layout.layout import Layout
from hpcpar.units import format_bytes, format_count

FEW_RANKS = 16  # up to here every rank gets a line


def describe(layout: Layout) -> str:
    """Tell parameters, mesh, stages, and (for few ranks) which rank holds which layers and shards."""
    mesh, job = layout.mesh, layout.job
    total = sum(p.numel for p in layout.table)
    lines = [
        f"parameters   {total:,} ({format_count(total)})",
        f"ranks        {mesh.size} = pp {mesh.pp_size} x dp {mesh.dp_size} x tp {mesh.tp_size}, tp fastest",
        f"batch        {job.train.global_batch} sequences = {mesh.dp_size} replicas x "
        f"{layout.num_microbatches} microbatches x {job.train.microbatch}",
        f"schedule     {job.layout.schedule}{_chunks(layout)}, ZeRO {job.layout.zero_text}, sequence parallelism "
        f"{job.layout.sequence_text}, recompute {job.layout.recompute}",
        "",
    ]
    lines += [_stage(layout, stage) for stage in range(mesh.pp_size)]
    if mesh.size <= FEW_RANKS:
        lines += ["", *(_rank(layout, rank) for rank in range(mesh.size))]
    return "\n".join(lines)


def _chunks(layout: Layout) -> str:
    chunks = len(layout.chunk_ranks) // layout.mesh.pp_size
    return f" with {chunks} chunks a stage" if chunks > 1 else ""


def _layers(layout: Layout, pp_rank: int) -> str:
    runs = [layout.chunks[chunk] for chunk in layout.chunks_of(pp_rank)]
    return ", ".join(f"{run.start}-{run.stop - 1}" for run in runs)


def _stage(layout: Layout, stage: int) -> str:
    mesh, home = layout.mesh, layout.chunk_ranks
    per_stage = mesh.size // mesh.pp_size
    extra = [word for word, here in (("embedding", stage == home[0]), ("logits", stage == home[-1])) if here]
    local = sum(b.numel for b in layout.buckets(stage, 0))
    return (f"stage {stage:<4} ranks {stage * per_stage}-{(stage + 1) * per_stage - 1:<6} layers "
            f"{_layers(layout, stage):<10} {format_count(local)} parameters a rank "
            f"{'+ ' + ', '.join(extra) if extra else ''}".rstrip())


def _rank(layout: Layout, rank: int) -> str:
    at = layout.mesh.coordinates(rank)
    job = layout.job
    table = {p.name: p for p in layout.table}
    head = f"layers.{layout.stages[at.pp_rank][0]}."
    boxes = {word: table[head + name].box(layout.mesh.tp_size, at.tp_rank)
             for word, name in (("q rows", "attention.q.weight"), ("ffn rows", "mlp.up.weight"))}
    parts = ", ".join(f"{word} {box.offset[0]}-{box.end[0] - 1}" for word, box in boxes.items())
    owned = sum(p.box.numel for p in layout.held_pieces(rank))
    master = 8 if job.train.precision == "fp64" else 4
    return (f"rank {rank:<4} {at!s:<24} layers {_layers(layout, at.pp_rank)}: {parts}; owns "
            f"{format_count(owned)} elements, {format_bytes(3 * master * owned)} of master weights and moments")
