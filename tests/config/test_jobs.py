"""The recipes in jobs/: each resolves, and has as many parameters as its publication says."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcpar.config.load import load_job
from hpcpar.config.resolve import resolve
from hpcpar.errors import UserError
from hpcpar.layout.layout import Layout
from hpcpar.layout.parameters import parameter_table

JOBS = Path(__file__).parents[2] / "jobs"
# published counts: GPT-3 in table D.1 of arXiv 2005.14165 (table 2.1 rounds them), Llama by the published weights'
# shapes, BLOOM in its model card, the others in the papers named in the files
PARAMETERS = {
    "gpt3-125m": 125e6, "gpt3-350m": 356e6, "gpt3-760m": 760e6, "gpt3-1.3b": 1320e6, "gpt3-2.7b": 2650e6,
    "gpt3-6.7b": 6660e6, "gpt3-13b": 12850e6, "gpt3-175b": 174600e6, "yuan-245b": 245.73e9, "mt-nlg-530b": 530e9,
    "megatron-1t": 1008e9, "bloom-176b": 176_247_271_424, "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192, "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
    "llama-3-405b": 405_853_388_800,
}
FILES = [path for path in sorted(JOBS.glob("*.toml")) if not path.stem.endswith("-base")]
EXACT = [name for name in PARAMETERS if name.startswith("llama")]


def parameters(name):
    return sum(p.numel for p in parameter_table(resolve(load_job(JOBS / f"{name}.toml")).model))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_resolves(path):
    job = resolve(load_job(path))
    layout = Layout(job)
    assert len(layout.stages) == job.layout.pp
    if job.machine.gpu != "cpu":
        assert job.world_size == job.machine.nodes * job.machine.gpus_per_node
    assert path.stem in {*PARAMETERS, "demo"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_within_a_percent_of_the_published(name):
    assert parameters(name) == pytest.approx(PARAMETERS[name], rel=0.01)


@pytest.mark.parametrize("name", EXACT)
def test_parameters_equal_those_of_published_weights(name):
    assert parameters(name) == PARAMETERS[name]


@pytest.mark.parametrize("name, words, reason", [
    ("gpt3-1.3b", ["--model.heads", "24"], r"24 does not divide model.hidden = 2048.*16 or 32"),
    ("gpt3-13b", ["--model.hidden", "5140"], r"40 does not divide model.hidden = 5140"),
])
def test_what_the_gpt3_table_misprints_is_refused(name, words, reason):
    with pytest.raises(UserError, match=reason):
        resolve(load_job(JOBS / f"{name}.toml", words))
