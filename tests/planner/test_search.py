from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcpar.cli import main
from hpcpar.config.load import override, to_toml
from hpcpar.config.resolve import resolve
from hpcpar.errors import UserError
from hpcpar.planner.params import total_parameters
from hpcpar.planner.plan import make_plan
from hpcpar.planner.practice import Practice
from hpcpar.planner.search import faster_by_overlap, layout_of, search, trainable
from hpcpar.planner.shapes import frontier, largest_in
from hpcpar.units import format_seconds
from tests.planner.jobs import job_of, mt_nlg, yuan


def test_the_search_finds_no_slower_layout_than_yuans() -> None:
    found = search(yuan(), 2128)
    published = make_plan(yuan())
    assert found.best[0].time.total <= published.time.total
    steps = [plan.time.total for plan in found.best]
    assert steps == sorted(steps)
    assert len(found.best) == 10
    for plan in found.best:
        assert plan.fits
        assert plan.job.world_size == 2128
        assert resolve(plan.job, 2128, on_paper=True) == plan.job  # legal, and complete


def test_530b_on_2240_gpus_keeps_tp_8() -> None:
    """As its authors chose, whose loss held whole logits; one in chunks changes nothing here."""
    for practice in (Practice(), None):
        best = search(mt_nlg(), 2240, practice=practice).best[0]
        assert best.fits and best.job.layout.tp == 8 and best.job.layout.pp == 35


def test_200b_on_2048_devices_is_no_worse_than_published() -> None:
    """PanGu-alpha's shape on (8, 16, 16)."""
    job = job_of(64, 16384, 128, 8, 16, 16, 1024, train={"precision": "fp16"}, machine={"gpu": "ascend-910"})
    assert search(job, 2048).best[0].time.total <= make_plan(job).time.total


def test_a_plan_names_the_pieces_of_tp_exchanges_that_it_foretells_a_gain_of() -> None:
    job = job_of(96, 12288, 96, 8, 16, 8, 1536)
    words = faster_by_overlap(make_plan(job))
    assert words.startswith("--layout.tp_overlap 2: in 2 pieces beside products, ") and "kept" not in words
    assert "q, k, v kept" in faster_by_overlap(make_plan(override(job, layout={"recompute": "selective"})))
    overlapped = make_plan(override(job, layout={"tp_overlap": 2}))
    assert words.endswith(f"a step of {format_seconds(overlapped.time.total)}")
    for told in ({"tp_overlap": 2}, {"sequence_parallel": False}, {"tp": 1, "dp": 64}):
        assert not faster_by_overlap(make_plan(resolve(override(job, layout=told), on_paper=True)))
    assert not faster_by_overlap(make_plan(override(job, machine={"gpu": "cpu"})))


def test_a_search_keeps_as_many_pieces_as_the_tokens_divide_into() -> None:
    job = job_of(24, 2304, 24, 2, 1, 16, 512, model={"seq": 2048 + 1024})
    found = search(override(job, layout={"tp_overlap": 9}), 32, top=30)
    pieces = {plan.job.layout.tp: plan.job.layout.tp_overlap for plan in found.best}
    assert pieces == {tp: 1 if tp == 1 else 3 for tp in pieces} and max(pieces) > 1
    for plan in found.best:
        assert resolve(plan.job, 32, on_paper=True) == plan.job


def test_every_refusal_has_a_reason_and_a_count() -> None:
    found = search(job_of(24, 2048, 32, 8, 1, 4, 480), 32)
    reasons = "\n".join(found.refused)
    for words in ("has no experts", "fits one rank", "would cross nodes", "does not divide"):
        assert words in reasons, words
    assert found.num_priced > 50


def test_long_sequences_try_context_parallelism() -> None:
    job = job_of(32, 4096, 32, 8, 1, 4, 64, model={"kind": "llama", "seq": 65536, "kv_heads": 8},
                 machine={"gpu": "h100-80g"})
    found = search(job, 32)
    assert not any("cp > 1" in why for why in found.refused)
    assert not all(trainable(plan.job) for plan in found.best)


def test_nothing_fits_is_said_with_the_reason() -> None:
    with pytest.raises(UserError, match=r"no layout of this model fits 8 a100-80g.*does not fit"):
        search(mt_nlg(), 8)


def test_search_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.toml"
    path.write_text(to_toml(job_of(24, 2048, 16, 1, 1, 8, 64)), encoding="utf-8")
    assert main(["plan", str(path), "--search", "--gpus", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["candidates"][0]["step_s"] == found["step_s"]
    assert {"tp", "pp", "dp", "zero", "microbatch", "recompute"} <= set(found["candidates"][0]["layout"])
    assert main(["plan", str(path), "--search", "--gpus", "16"]) == 0
    page = capsys.readouterr().out
    assert "the second loses" in page
    assert "refused:" in page


def test_a_plan_of_a_candidate_is_the_candidate() -> None:
    best = search(job_of(24, 2048, 16, 1, 1, 8, 64), 16).best[0]
    layout = layout_of(best)
    micro = layout.pop("microbatch")
    again = override(job_of(24, 2048, 16, 1, 1, 8, 64), layout=layout, train={"microbatch": micro})
    assert make_plan(resolve(again, on_paper=True)).time.total == pytest.approx(best.time.total)


def test_codesign_finds_shapes_for_a_budget() -> None:
    shapes = frontier(job_of(24, 2048, 16, 1, 1, 8, 256), 64, 7e9, top=4, tried=6)
    assert len(shapes) == 4
    for shape in shapes:
        assert total_parameters(shape.model) == pytest.approx(7e9, rel=0.04)
        assert shape.model.hidden % shape.model.heads == 0
    rates = [shape.params / shape.plan.time.total for shape in shapes]
    assert rates == sorted(rates, reverse=True)


def test_the_largest_model_grows_with_the_days() -> None:
    job = job_of(24, 2048, 16, 1, 1, 8, 256)
    week, month = (largest_in(job, 16, days).params for days in (7, 28))
    assert 1.5 < month / week < 3  # work grows with the square of the parameters
