from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from hpcpar.errors import UserError
from hpcpar.planner.hardware import known_machines, load_machine, machine_from_tables, machine_toml
from hpcpar.planner.kernels import product_s


def test_the_machines_that_people_have_are_known() -> None:
    assert {"v100-32g", "a100-40g", "a100-80g", "h100-80g", "h200", "b200", "gb200", "ascend-910",
            "cpu"} <= set(known_machines())


@pytest.mark.parametrize("name", known_machines())
def test_a_machine_survives_its_toml_and_names_its_sources(name: str) -> None:
    machine = load_machine(name)
    again = machine_from_tables(name, tomllib.loads(machine_toml(machine)))
    assert dataclasses.asdict(again) == dataclasses.asdict(machine)
    assert machine.source and all(len(line) > 20 for line in machine.source)


@pytest.mark.parametrize("name", [n for n in known_machines() if load_machine(n).matmul.measured])
def test_measured_products_bound_what_is_foretold(name: str) -> None:
    """Published best-of-many rates are bursts; what is foretold is sustained in training: lower, but not by half."""
    machine = load_machine(name)
    for m, n, k, tflops in machine.matmul.measured:
        foretold = 2 * m * n * k / product_s(machine, int(m), int(n), int(k), "fp16") / 1e12
        assert 0.55 * tflops < foretold <= 1.02 * tflops, (name, foretold, tflops)


def test_a_users_machine_stands_on_a_known_one(tmp_path: Path) -> None:
    path = tmp_path / "ours.toml"
    path.write_text('base = "a100-80g"\n[across]\ngb_per_s = 12.5\n', encoding="utf-8")
    ours, known = load_machine(str(path)), load_machine("a100-80g")
    assert ours.across.gb_per_s == 12.5
    assert ours.across.latency_us == known.across.latency_us
    assert ours.chip == known.chip


@pytest.mark.parametrize(("text", "said"), [
    ('base = "a100-80g"\n[chip]\nmemory_gib = "x"\n', "chip.memory_gib"),
    ('base = "a100-80g"\n[chip]\nmemory = 1\n', "did you mean memory_gib?"),
    ('base = "a100-80g"\n[links]\nx = 1\n', "unknown table"),
    ("[chip]\nmemory_gib = 80.0\n", "is missing"),
    ("[chip\n", "is not a machine TOML"), ('base = "a100-80gg"\n', "did you mean a100-80g?"),
    ("base = 3\n", "3 is no known machine"), ('base = "a100-80g"\nsource = 3\n', "must be a list of texts"),
    ('base = "a100-80g"\n[chip]\ngb_per_s = 0\n', "above 0"), ('base = "a100-80g"\n[chip]\ncores = 2.5\n', "whole"),
    ('base = "a100-80g"\n[peak_tflops]\nbf16 = nan\n', "above 0"),
    ('base = "a100-80g"\n[matmul]\nmeasured = 3\n', "rows"),
    ('base = "a100-80g"\n[inside]\ndevices = 0\n', "devices"),
    ('base = "a100-80g"\n[matmul]\nunits = 0\n', "matmul.units: is 0, must be a number above 0"),
    ('base = "a100-80g"\n[matmul]\ntile = [128]\n', "must be two numbers"),
    ('base = "a100-80g"\n[matmul]\nalignment = 3\n', "power of 2"),
    ('base = "a100-80g"\n[matmul]\nmeasured = [[1, 2, 3, "x"]]\n', "measured row 1"),
])
def test_a_bad_machine_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        load_machine(str(path))


def test_an_unknown_gpu_gets_a_did_you_mean() -> None:
    with pytest.raises(UserError, match="did you mean a100-80g"):
        load_machine("a100-80gb")


@pytest.mark.parametrize("name", known_machines())
def test_memory_and_links_are_foretold_near_what_others_measured(name: str) -> None:
    """And where nothing was measured, or not found, the sources say so."""
    machine = load_machine(name)
    for part, rate in ((machine.chip, machine.chip.bytes_per_s), (machine.inside, machine.inside.bytes_per_s)):
        if part.measured_gb_per_s:
            assert rate / 1e9 == pytest.approx(part.measured_gb_per_s, rel=0.1)
            assert part.measured_gb_per_s < part.gb_per_s


def test_the_documents_table_is_that_of_the_machines() -> None:
    """docs/planner.md shows each machine's datasheet beside what was measured."""
    page = (Path(__file__).parents[2] / "docs/planner.md").read_text(encoding="utf-8")
    for name in known_machines():
        if name != "cpu":
            assert table_row(name) in page, table_row(name)


def table_row(name: str) -> str:
    machine = load_machine(name)
    best = max((row[-1] for row in machine.matmul.measured), default=0.0)
    chip, inside, across = machine.chip, machine.inside, machine.across
    pairs = [(max(machine.peak_tflops.bf16, machine.peak_tflops.fp16), best), (chip.gb_per_s, chip.measured_gb_per_s),
             (inside.gb_per_s, inside.measured_gb_per_s)]
    cells = [f"{sheet:g} | {measured:g}" if measured else f"{sheet:g} | -" for sheet, measured in pairs]
    return f"| {name} | {chip.memory_gib:g} | {' | '.join(cells)} | {across.gb_per_s:g} | " \
           f"{machine.host.bytes_per_s / 1e9:.3g} |"
