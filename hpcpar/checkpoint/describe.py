"""Checkpoint sets as people look at them: what is there, what is in one, who wrote which part of a tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpcpar.checkpoint.format import Manifest, StoredBox, read_manifest
from hpcpar.checkpoint.verify import named_sets
from hpcpar.errors import CheckpointError, UserError, did_you_mean
from hpcpar.layout.boxes import whole
from hpcpar.layout.layout import Layout
from hpcpar.units import format_bytes, format_count

SHOWN = 24  # lines of a list; the rest is counted
PICTURE = (16, 64)  # rows and columns of a drawn tensor
MARKS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def list_sets(checkpoints: Path) -> list[str]:
    """Return a line a set, oldest first, then a line a folder that is no published set."""
    lines = []
    named = named_sets(checkpoints)
    for path in named:
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            lines.append(f"{path.name:<22} DAMAGED  {error}")
            continue
        size = sum(file.size for file in manifest.files)
        lines.append(f"{path.name:<22} {format_bytes(size):>10}  {len(manifest.files):>5} files  "
                     f"{_saved_by(manifest.state)}")
    for path in sorted(checkpoints.glob("*step-*")):
        if path not in named:
            lines.append(f"{path.name:<22} not published: {_what(path.name)}")
    return lines


def describe_set(path: Path) -> list[str]:
    """Return what a set holds: kinds, tensors (equal ones of many layers in a line), files by who wrote them."""
    manifest = read_manifest(path)
    num_elements = sum(whole(shape).numel for shape in manifest.tensors.values())
    size = sum(file.size for file in manifest.files)
    writers = _writers(manifest)
    lines = [f"{path}: step {manifest.step}, {_saved_by(manifest.state)}",
             f"kinds    {', '.join(f'{kind} {dtype}' for kind, dtype in manifest.kinds.items())}",
             f"tensors  {len(manifest.tensors)} of {format_count(num_elements)} elements, "
             f"{format_bytes(_bytes(manifest, manifest.tensors))} in all kinds"]
    rows = []
    for names in _alike(manifest):
        boxes = sum(len(writers[name]) for name in names)
        ranks = {rank for name in names for _, wrote, _ in writers[name] for rank in wrote}
        shape = " x ".join(map(str, manifest.tensors[names[0]]))
        rows.append((next(grouped(names)), shape, format_bytes(_bytes(manifest, names)), _count(boxes, "box"),
                     f"by {ranges(ranks, 'rank')}"))
    lines += _columns(rows, "<<>><")
    lines.append(f"files    {len(manifest.files)} of {format_bytes(size)}")
    largest = max(file.size for file in manifest.files)
    rows = [(file.name, format_bytes(file.size), "█" * max(1, round(16 * file.size / largest)),
             f"by {ranges(file.ranks, 'rank')}" if file.ranks else "the index",
             f"{_count(len(file.boxes), 'box')} of {_parts(file.boxes)}" if file.boxes else "")
            for file in manifest.files]
    return lines + _columns(rows, "<><<<")


def describe_tensor(path: Path, name: str) -> list[str]:
    """Return one tensor's boxes, and a picture of it in which each place shows the file that holds it."""
    manifest = read_manifest(path)
    if name not in manifest.tensors:
        raise UserError(name, f"is not in {path}", did_you_mean(name, manifest.tensors))
    shape, found = manifest.tensors[name], _writers(manifest)[name]
    mark = {file: MARKS[number % len(MARKS)] for number, file in enumerate(dict.fromkeys(f for f, _, _ in found))}
    # a vector is a row, further dims lie behind the second
    rows, columns = (1, shape[0]) if len(shape) == 1 else shape[:2]
    picture = np.full((min(rows, PICTURE[0]), min(columns, PICTURE[1])), "?")
    high, wide = picture.shape
    down = (np.arange(high) * 2 + 1) * rows // (2 * high)
    across = (np.arange(wide) * 2 + 1) * columns // (2 * wide)
    for file, _, (_, box) in found:
        low, end = (box.offset, box.end) if len(shape) > 1 else ((0, *box.offset), (1, *box.end))
        inside = ((down >= low[0]) & (down < end[0]))[:, None] & ((across >= low[1]) & (across < end[1]))
        picture[inside] = mark[file]
    lines = [f"{name}  {' x '.join(map(str, shape))}, {format_bytes(_bytes(manifest, [name]))} in "
             f"{_count(len(manifest.kinds), 'kind')}, {_count(len(found), 'box')}"]
    lines += [f"  {''.join(row)}" for row in picture]
    return lines + _columns([(mark[file], file, f"by {ranges(ranks, 'rank')}",
                              "[" + ", ".join(f"{o}:{e}" for o, e in zip(box.offset, box.end, strict=True)) + "]")
                             for file, ranks, (_, box) in found], "<<<<")


def bytes_to_read(manifest: Manifest, layout: Layout, global_rank: int) -> int:
    """Return the bytes that a rank reads under a layout: the boxes that it holds, as they are stored."""
    numel = sum(piece.box.numel for piece in layout.held_pieces(global_rank))
    return numel * sum(np.dtype(dtype).itemsize for dtype in manifest.kinds.values())


def grouped(names: Iterable[str]) -> Iterator[str]:
    """Yield tensor names with equal ones of many layers as one: layers.0-3.mlp.up.weight."""
    by_pattern: dict[str, list[int]] = {}
    for name in names:
        layer = re.match(r"layers\.(\d+)\.", name)
        pattern = name if layer is None else f"layers.{{}}.{name[layer.end():]}"
        by_pattern.setdefault(pattern, []).extend([int(layer[1])] if layer else [])
    yield from (pattern.replace("{}", ranges(layers)) for pattern, layers in by_pattern.items())


def ranges(numbers: Iterable[int], word: str = "") -> str:
    """Write numbers as ranges: {0, 1, 2, 5} -> '0-2,5'; with a word, 'ranks 0-2,5'."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    many = len(runs) > 1 or any(a != b for a, b in runs)
    return f"{word}{'s' * many} {text}" if word else text


def _saved_by(state: Mapping[str, Any]) -> str:
    """Say what the trainer's state tells of the run; a set may be from another program."""
    job = state.get("job", {})
    layout, train = job.get("layout", {}), job.get("train", {})
    cut = " x ".join(f"{axis} {layout[axis]}" for axis in ("tp", "pp", "dp") if axis in layout)
    samples = state.get("progress", {}).get("samples")
    parts = [f"{samples:,} samples" if samples is not None else "", cut,
             f"zero {layout['zero']}" if "zero" in layout else "", str(train.get("precision", ""))]
    return ", ".join(part for part in parts if part) or "saved by another program"


def _what(name: str) -> str:
    for end, text in ((".tmp", "being written, or left by a killed save"), (".gone", "being deleted"),
                      (".old", "replaced by a newer save of the same step")):
        if name.endswith(end):
            return text
    return "moved aside by a rewind; delete it when nobody misses it" if ".aside" in name else "unknown"


def _writers(manifest: Manifest) -> dict[str, list[tuple[str, tuple[int, ...], StoredBox]]]:
    """Return by tensor the (file, ranks, box) that make it up."""
    found: dict[str, list[tuple[str, tuple[int, ...], StoredBox]]] = {name: [] for name in manifest.tensors}
    for file in manifest.files:
        for box in file.boxes:
            found[box.tensor].append((file.name, file.ranks, box))
    return found


def _alike(manifest: Manifest) -> list[list[str]]:
    """Gather the tensors that differ in their layer only."""
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, shape in manifest.tensors.items():
        groups.setdefault((re.sub(r"^layers\.\d+\.", "layers.*.", name), shape), []).append(name)
    return list(groups.values())


def _parts(boxes: Iterable[StoredBox]) -> str:
    """Name the parts of the model that boxes belong to: embedding, layers 0-3."""
    tops = [box.tensor.split(".")[:2] for box in boxes]
    layers = {int(parts[1]) for parts in tops if parts[0] == "layers"}
    others = dict.fromkeys(parts[0] for parts in tops if parts[0] != "layers")
    return ", ".join([*others, *([ranges(layers, "layer")] if layers else [])])


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 'es' if word.endswith('x') else 's'}"


def _bytes(manifest: Manifest, names: Iterable[str]) -> int:
    return sum(whole(manifest.tensors[name]).numel * np.dtype(dtype).itemsize
               for name in names for dtype in manifest.kinds.values())


def _columns(rows: Sequence[tuple[str, ...]], sides: str) -> list[str]:
    """Line up a table; a long one loses its middle."""
    if len(rows) > SHOWN + 1:
        rows = [*rows[: SHOWN // 2], (f"... {len(rows) - SHOWN} more",), *rows[-SHOWN // 2 :]]
    widths = [max(len(row[i]) for row in rows if i < len(row) and len(row) > 1) for i in range(len(sides))]
    return ["  " + "  ".join(f"{text:{side}{width}}" for text, side, width in zip(row, sides, widths, strict=False))
            .rstrip() for row in rows]
