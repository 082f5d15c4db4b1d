"""Traffic foretold against the formulas of the papers."""

from __future__ import annotations

import pytest

from hpcpar.config.job import Job
from hpcpar.config.load import override
from hpcpar.config.resolve import resolve
from hpcpar.layout.layout import Layout
from hpcpar.layout.mesh import Coordinates
from hpcpar.layout.traffic import Call, Traffic, wire_bytes

SEQ, HIDDEN, LAYERS = 64, 128, 8


def traffic(pp_rank=0, tp=4, pp=1, dp=1, **layout):
    job = resolve(override(Job(), model={"layers": LAYERS, "hidden": HIDDEN, "heads": 4, "seq": SEQ, "vocab": 512},
                           layout={"tp": tp, "pp": pp, "dp": dp, **layout}, train={"global_batch": 2 * dp}))
    return Traffic(Layout(job), Coordinates(pp_rank, 0, 0, 0))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_layer_moves_8bsh_over_tp(sequence_parallel):
    """Narayanan et al. 2021, section 3.2: 8 b s h (t-1)/t elements a layer and microbatch; sequence parallel equal."""
    of = traffic(1, pp=4, sequence_parallel=sequence_parallel)
    elements = sum(wire_bytes(c, 4) for c in of.forward(1) + of.backward(1)) / 2 / (LAYERS / 4)
    assert elements == 8 * SEQ * HIDDEN * 3 / 4


def test_exchanges_in_pieces_move_the_same_in_more_calls():
    whole, pieces = traffic(1, pp=4), traffic(1, pp=4, tp_overlap=4)
    for way in ("forward", "backward"):
        calls, cut = getattr(whole, way)(1), getattr(pieces, way)(1)
        assert cut == tuple(call._replace(num_bytes=call.num_bytes // 4) for call in calls for _ in range(4))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_full_recompute_repeats_all_but_the_last_exchange(sequence_parallel):
    """The formula's 12 b s h counts a whole second forward; torch stops before the exchange that leaves the MLP."""
    of = traffic(1, pp=4, sequence_parallel=sequence_parallel, recompute="full")
    left_out = 1 if sequence_parallel else 2  # a reduce-scatter, or an all-reduce
    elements = sum(wire_bytes(c, 4) for c in of.forward(1) + of.backward(1)) / 2 / (LAYERS / 4)
    assert elements == (12 - left_out) * SEQ * HIDDEN * 3 / 4


def test_gradients_and_weights_cross_dp_once():
    """ZeRO-1 with fp32 gradients and 2-byte weights: (4 + 2) (d-1)/d bytes an element, padding included."""
    of = traffic(tp=1, dp=4)
    numel = sum(b.numel for b in of.layout.buckets(0, 0))
    calls = [c for c in of.step(of.layout.program(0, of.layout.num_microbatches)) if c.group == "dp"]
    assert sum(wire_bytes(c, 4) for c in calls) == pytest.approx(numel * 6 * 3 / 4)


def test_one_rank_calls_nobody():
    of = traffic(tp=1)
    assert of.step(of.layout.program(0, 2)) == []


@pytest.mark.parametrize("sequence_parallel, share", [(False, 1), (True, 4)])
def test_a_stage_boundary_carries_bsh(sequence_parallel, share):
    of = traffic(pp=2, sequence_parallel=sequence_parallel)
    sends = [c for c in of.step(of.layout.program(0, 2)) if c.op == "send" and c.peer == 1]
    assert sends[:2] == [Call("send", "pp_forward", SEQ * HIDDEN * 2 // share, 1)] * 2
