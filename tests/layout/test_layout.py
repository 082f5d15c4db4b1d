from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from hpcpar.config.load import job_from_tables
from hpcpar.config.resolve import resolve
from hpcpar.layout.boxes import Box
from hpcpar.layout.describe import describe
from hpcpar.layout.layout import Layout
from hpcpar.layout.schedule import Kind, check_programs


def cover(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray:
    """How often each part of a tensor is covered, on the grid of the boxes' edges: a big tensor in few numbers."""
    edges = [sorted({0, n, *(b.offset[d] for b in boxes), *(b.end[d] for b in boxes)}) for d, n in enumerate(shape)]
    assert all(e[0] == 0 and e[-1] == n for e, n in zip(edges, shape, strict=True))
    index = [{edge: i for i, edge in enumerate(e)} for e in edges]
    times = np.zeros([len(e) - 1 for e in edges], np.int64)
    for box in boxes:
        times[tuple(slice(i[a], i[b]) for i, a, b in zip(index, box.offset, box.end, strict=True))] += 1
    return times


def yuan() -> Layout:
    return Layout(resolve(job_from_tables({
        "model": {"layers": 76, "hidden": 16384, "heads": 128, "seq": 2048, "vocab": 53228},
        "layout": {"tp": 8, "pp": 38, "dp": 7}, "train": {"global_batch": 3360},
    }), 2128))


def test_yuans_2128_ranks_store_every_element_once() -> None:
    layout = yuan()
    boxes: defaultdict[str, list[Box]] = defaultdict(list)
    for rank in range(layout.mesh.size):
        for piece in layout.stored_pieces(rank):
            boxes[piece.parameter.name].append(piece.box)
    assert set(boxes) == {p.name for p in layout.table}
    for p in layout.table:
        assert (cover(p.shape, boxes[p.name]) == 1).all(), p.name


def test_yuan_in_words() -> None:
    text = describe(yuan())
    assert "(245.73B)" in text
    assert "2128 = pp 38 x dp 7 x tp 8" in text
    assert len([line for line in text.splitlines() if line.startswith("stage ")]) == 38
    assert not [line for line in text.splitlines() if line.startswith("rank ")]


@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("tp", "pp", "dp", "schedule"), [
    (1, 1, 1, "1f1b"), (4, 1, 1, "1f1b"), (1, 3, 1, "1f1b"), (1, 1, 3, "1f1b"), (2, 2, 2, "1f1b"), (4, 3, 2, "1f1b"),
    (2, 3, 2, "interleaved"), (1, 2, 3, "zbv"),
])
def test_stored_once_held_as_often_as_copied(zero: int, tied: bool, tp: int, pp: int, dp: int, schedule: str) -> None:
    chunks = 1 if schedule == "1f1b" else 2
    layout = Layout(resolve(job_from_tables({
        "model": {"kind": "llama", "layers": 7 if chunks > 1 else 3, "hidden": 32, "heads": 8, "kv_heads": 2,
                  "ffn": 40, "seq": 8, "vocab": 53, "tied": tied},
        "layout": {"tp": tp, "pp": pp, "dp": dp, "zero": zero, "bucket_mib": 0.005, "schedule": schedule,
                   "chunks": chunks}, "train": {"global_batch": 6},
    })))
    stored, held = ({p.name: np.zeros(p.shape, int) for p in layout.table} for _ in range(2))
    for rank in range(layout.mesh.size):
        for piece in layout.stored_pieces(rank):
            stored[piece.parameter.name][piece.box.slices()] += 1
        for piece in layout.held_pieces(rank):
            held[piece.parameter.name][piece.box.slices()] += 1
    for p in layout.table:
        assert (stored[p.name] == 1).all(), p.name
        copies = (tp if p.tp_dim is None else p.shared_by(tp)) * (1 if zero else dp)
        copies *= 2 if layout.tied_across_stages and p.name == "embedding.token.weight" else 1
        assert (held[p.name] == copies).all(), p.name


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_a_validation_only_goes_forward(pp: int) -> None:
    layout = Layout(resolve(job_from_tables({"model": {"layers": 4}, "layout": {"pp": pp}})))
    programs = [layout.forward_program(stage, 5) for stage in range(pp)]
    check_programs(programs)
    for program in programs:
        assert [m for kind, m, _ in program if kind is Kind.FORWARD] == list(range(5))
        assert not {Kind.BACKWARD, Kind.SEND_BACKWARD, Kind.RECEIVE_BACKWARD} & {kind for kind, *_ in program}
