"""How hpcpar's own way of working follows from a job and a machine."""

from __future__ import annotations

import pytest

from hpcpar.planner.hardware import load_machine
from hpcpar.planner.plan import make_plan
from tests.planner.jobs import job_of


@pytest.mark.parametrize(("gpu", "change", "fused"), [
    ("h100-80g", {}, True),
    ("h100-80g", {"train": {"compile": False}}, False),
    ("h100-80g", {"train": {"precision": "fp32"}}, False),
    ("h100-80g", {"layout": {"schedule": "zbv", "chunks": 2, "pp": 2}}, False),
    ("cpu", {}, False),
    ("cpu", {"train": {"compile": True}}, True),
], ids=str)
def test_layers_are_priced_as_compiled_where_the_trainer_compiles_them(
        gpu: str, change: dict[str, dict[str, object]], fused: bool) -> None:
    job = job_of(4, 1024, 8, 1, 1, 1, 8, **change | {"machine": {"gpu": gpu}})
    assert make_plan(job, load_machine(gpu)).pricing.practice.fused == fused


def test_a_compiled_layer_moves_less_memory() -> None:
    compiled, eager = (make_plan(job_of(4, 1024, 8, 1, 1, 1, 8, model={"kind": "llama"}, layout={"recompute": "none"},
                                        train={"compile": compile_})) for compile_ in (True, False))
    assert compiled.time.parts["elementwise"] < eager.time.parts["elementwise"]
    assert compiled.memory[0].activations < eager.memory[0].activations
