"""TOML in and out, `base`, overrides, and what a wrong word is answered with."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from hpcpar.cli import _parser
from hpcpar.config.job import Job
from hpcpar.config.load import describe_options, job_from_tables, load_job, override, parse_overrides, to_toml
from hpcpar.errors import UserError

FIELDS = [(table, f) for table, section in typing.get_type_hints(Job).items() for f in dataclasses.fields(section)]

# one value for every option, none of them the default
UNUSUAL: dict[str, dict[str, Any]] = {
    "model": {"kind": "llama", "layers": 7, "hidden": 96, "heads": 6, "kv_heads": 3, "ffn": 77, "seq": 33, "vocab": 91,
              "tied": False, "dropout": 0.25, "init_std": 0.125, "rope_theta": 5e5, "qk_norm": True, "z_loss": 1e-4,
              "embedding_grad": 0.1},
    "layout": {"tp": 3, "pp": 2, "dp": 5, "cp": 2, "ep": 4, "chunks": 2, "schedule": "gpipe", "zero": 0,
               "table": ("0F0", "1F0"), "sequence_parallel": False, "tp_overlap": 2, "recompute": "selective",
               "bucket_mib": 0.5},
    "train": {"global_batch": 60, "microbatch": 2, "steps": 17, "precision": "fp64", "seed": 12345678901234567,
              "compile": True},
    "optim": {"lr": 1.2345678901234567e-5, "min_lr": 1e-7, "betas": (0.8, 0.999), "eps": 1e-16, "weight_decay": 0.0,
              "clip": 0.3, "warmup_steps": 4, "decay_steps": 15, "ramp": (20, 20, 400)},
    "data": {"store": (("a b/\u4e2d\U0001f600\x7f", 1.0), ('quo"te\\', 2.5)), "validation": 0.5, "validate_every": 3,
             "validate_samples": 7},
    "checkpoint": {"every": "auto", "keep": 0, "keep_every": 90, "asynchronous": False, "ranks_per_file": 4,
                   "compression": "blosc2-lz4"},
    "stability": {"spike": 8.0, "on_spike": "rollback", "check_replicas_every": 7},
    "health": {"step_limit_s": 2.5},
    "machine": {"gpu": "A100", "nodes": 3, "gpus_per_node": 4, "mtbf_h": 77.5},
    "submit": {"walltime_min": 5, "partition": "gpu", "account": "p#1", "mpi": "pmix", "cpus_per_task": 6,
               "exclude": ("n1", "n2"), "setup": ("module load x", "export A='b\tc'"), "constraint": "ib&a100",
               "price_per_gpu_hour": 2.5,
               "gres": "gpu:a100", "container": "apptainer exec a.sif", "stage_env": "/scratch",
               "elastic": True, "retries": 0},
}


def write(folder: Path, text: str, name: str = "job.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(tables: dict[str, Any]) -> UserError:
    with pytest.raises(UserError) as caught:
        job_from_tables(tables)
    return caught.value


def test_the_unusual_job_names_every_option_and_no_default() -> None:
    assert {(t, k) for t, values in UNUSUAL.items() for k in values} == {(t, f.name) for t, f in FIELDS}
    for table, f in FIELDS:
        assert UNUSUAL[table][f.name] != f.default, (table, f.name)


def test_every_option_survives_the_way_through_toml(tmp_path: Path) -> None:
    job = job_from_tables(UNUSUAL)
    for table, f in FIELDS:
        assert getattr(getattr(job, table), f.name) == UNUSUAL[table][f.name]
    assert load_job(write(tmp_path, to_toml(job))) == job


def test_defaults_survive_too(tmp_path: Path) -> None:
    assert load_job(write(tmp_path, "")) == Job()
    assert load_job(write(tmp_path, to_toml(Job()))) == Job()


@pytest.mark.parametrize("text", ["plain", "tab\t", 'quote " and \\', "zeile\nneu", "ü中", "\U0001f600", "\x7f\x01"])
def test_any_text_survives(tmp_path: Path, text: str) -> None:
    job = override(Job(), submit={"account": text})
    assert load_job(write(tmp_path, to_toml(job))).submit.account == text


def test_base_lies_beneath_and_overrides_on_top(tmp_path: Path) -> None:
    write(tmp_path, "[model]\nlayers = 3\nhidden = 64\nheads = 4\n[train]\nseed = 5\n", "base.toml")
    path = write(tmp_path, 'base = "base.toml"\n[model]\nhidden = 128\nheads = 8\n')
    job = load_job(path, ["--model.heads", "2"])
    assert (job.model.layers, job.model.hidden, job.model.heads, job.train.seed) == (3, 128, 2, 5)


def test_base_is_looked_for_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    write(inner, "[train]\nseed = 9\n", "base.toml")
    monkeypatch.chdir(tmp_path)
    assert load_job(write(inner, 'base = "base.toml"\n')).train.seed == 9


def test_base_of_a_base_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "", "c.toml")
    write(tmp_path, 'base = "c.toml"\n', "b.toml")
    with pytest.raises(UserError, match=r"b\.toml: has a base of its own; one level"):
        load_job(write(tmp_path, 'base = "b.toml"\n'))


@pytest.mark.parametrize(("text", "words", "where"), [
    ("base = 3\n", [], "base"),
    ("model = 3\n", [], "model"),
    ("model = 3\n", ["--model.layers", "2"], "model"),
    ('base = "base.toml"\nmodel = 3\n', [], "model"),
    ('base = "wrong.toml"\n', [], "model"),
    ('base = "wrong.toml"\n[model]\nlayers = 1\n', [], "model"),
    ('base = "none.toml"\n', [], "none.toml"),
    ("[model\n", [], "job.toml"),
    ("[[model]]\nlayers = 1\n", [], "model"),
])
def test_a_file_of_the_wrong_build_is_the_users_error(tmp_path: Path, text: str, words: list[str], where: str) -> None:
    write(tmp_path, "[model]\nlayers = 3\n", "base.toml")
    write(tmp_path, "model = 7\n", "wrong.toml")
    with pytest.raises(UserError) as caught:
        load_job(write(tmp_path, text), words)
    assert caught.value.where.endswith(where)
    assert caught.value.fix


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "job.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="cannot read the job file"):
        load_job(path)


@pytest.mark.parametrize(("words", "table", "key", "value"), [
    (["--layout.tp", "4"], "layout", "tp", 4),
    (["--layout.tp=4"], "layout", "tp", 4),
    (["--optim.lr", "1e-4"], "optim", "lr", 1e-4),
    (["--optim.lr", "1"], "optim", "lr", 1.0),
    (["--model.tied", "false"], "model", "tied", False),
    (["--train.precision", "fp32"], "train", "precision", "fp32"),
    (["--train.precision", '"fp32"'], "train", "precision", "fp32"),
    (["--optim.betas", "[0.5, 0.75]"], "optim", "betas", (0.5, 0.75)),
    (["--optim.ramp=[16, 16, 100]"], "optim", "ramp", (16, 16, 100)),
    (["--submit.partition", "gpu-a100"], "submit", "partition", "gpu-a100"),
    (["--submit.partition="], "submit", "partition", ""),
    (["--data.store", "/data/with=equals"], "data", "store", "/data/with=equals"),
    (["--data.store", '[["a", 1], ["b", 2.5]]'], "data", "store", (("a", 1.0), ("b", 2.5))),
    (["--submit.exclude", '["n1"]'], "submit", "exclude", ("n1",)),
    (["--submit.exclude", "n1,n2"], "submit", "exclude", ("n1", "n2")),
    (["--submit.account", "1234"], "submit", "account", "1234"),
    (["--submit.partition", "true"], "submit", "partition", "true"),
    (["--data.store", "2026"], "data", "store", "2026"),
    (["--layout.tp", "2", "--layout.tp", "8"], "layout", "tp", 8),
])
def test_overrides_and_their_types(tmp_path: Path, words: list[str], table: str, key: str, value: Any) -> None:
    job = load_job(write(tmp_path, ""), words)
    found = getattr(getattr(job, table), key)
    assert found == value
    assert type(found) is type(value)


def test_a_cluster_profile_is_stronger_than_the_file_and_weaker_than_a_flag(tmp_path: Path) -> None:
    job = write(tmp_path, '[machine]\nnodes = 7\n[submit]\naccount = "file"\npartition = "file"\n')
    cluster = write(tmp_path, '[submit]\naccount = "profile"\npartition = "profile"\n', "cluster.toml")
    loaded = load_job(job, ["--submit.partition", "flag"], cluster)
    assert (loaded.machine.nodes, loaded.submit.account, loaded.submit.partition) == (7, "profile", "flag")
    with pytest.raises(UserError, match=r"has train, but a cluster profile .* keep \[machine\] and \[submit\]"):
        load_job(job, [], write(tmp_path, "[train]\nsteps = 1\n", "wrong.toml"))


@pytest.mark.parametrize(("words", "message"), [
    (["--layout.tpp", "4"], r"--layout\.tpp: unknown option; did you mean layout\.tp\?"),
    (["--modle.layers", "4"], r"--modle\.layers: unknown option; did you mean model\.layers\?"),
    (["--zzzzzzzzzzzz", "4"], "--zzzzzzzzzzzz: unknown option; `hpcpar options` lists them"),
    (["layout.tp", "4"], r"layout\.tp: is not an option; options look like"),
    (["--layout.tp"], r"--layout\.tp: has no value"),
    (["--layout.tp", "--layout.pp", "2"], r"--layout\.tp: has no value"),
])
def test_overrides_that_are_none(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_overrides(words)


@pytest.mark.parametrize(("tables", "message"), [
    ({"modle": {}}, "modle: unknown table; did you mean model?"),
    ({"model": {"layer": 3}}, "model.layer: unknown option; did you mean layers?"),
    ({"model": {"num_heads": 3}}, "model.num_heads: unknown option; did you mean heads?"),
    ({"layout": {"recompute": "ful"}},
     'layout.recompute: is "ful", must be one of none, selective, full, offload, auto; did you mean full?'),
    ({"train": {"precision": "bfloat16"}},
     'train.precision: is "bfloat16", must be one of fp64, fp32, bf16, fp16; did you mean bf16?'),
    *(({"layout": {"zero": wrong}}, f"layout.zero: is {text}, must be one of 0, 1, 2, 3 or [one of 1, 2, 3, a whole "
       "number]; for example 0") for wrong, text in [(4, "4"), (True, "true"), ([0, 8], "[0, 8]"), ([3], "[3]")]),
])
def test_a_wrong_word_is_answered_with_the_right_one(tables: dict[str, Any], message: str) -> None:
    assert str(refused(tables)) == message


WRONG = {int: ["3", 3.0, True, [3]], float: ["1e-4", True, float("nan"), float("inf"), -float("inf"), 10**400],
         bool: [0, 1, "true"], str: [3, True, ["a"]]}


@pytest.mark.parametrize(("table", "f"), FIELDS, ids=lambda x: getattr(x, "name", x))
def test_wrong_types_and_non_finite_numbers_are_refused(table: str, f: dataclasses.Field[Any]) -> None:
    hint = typing.get_type_hints(typing.get_type_hints(Job)[table])[f.name]
    kinds = [h for h in (hint, *typing.get_args(hint)) if h in WRONG]
    wrong = [raw for raw in WRONG[kinds[0]] if kinds[0] is hint or not isinstance(raw, list)] if kinds else [{}, 3.5]
    for raw in [*wrong, {"a": 1}]:
        error = refused({table: {f.name: raw}})
        assert error.where == f"{table}.{f.name}"
        assert "must be" in error.rule and error.fix


@pytest.mark.parametrize(("key", "raw"), [
    ("betas", [0.9]), ("betas", [0.9, 0.95, 0.99]), ("betas", [0.9, "x"]), ("betas", [0.9, float("nan")]),
    ("ramp", [1, 2]), ("ramp", [1, 2.0, 3]), ("ramp", 16),
])
def test_lists_of_the_wrong_build_are_refused(key: str, raw: Any) -> None:
    assert refused({"optim": {key: raw}}).where == f"optim.{key}"


BOUNDED = [(t, f) for t, f in FIELDS if f.metadata["low"] is not None]


@pytest.mark.parametrize(("table", "f"), BOUNDED, ids=lambda x: getattr(x, "name", x))
def test_the_least_legal_value_is_legal_and_what_lies_below_is_not(table: str, f: dataclasses.Field[Any]) -> None:
    low = f.metadata["low"]
    job_from_tables({table: {f.name: low}})
    error = refused({table: {f.name: low - 1}})
    assert error.where == f"{table}.{f.name}"
    assert f"must be at least {low}" in error.rule and error.fix == f"write {f.name} = {low}"


def test_there_are_at_most_100_options_in_all() -> None:
    """A flag of several commands counts once, and so does one that stands for an option of the job file."""
    def flags(parser: argparse.ArgumentParser) -> list[str]:
        found = []
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, made in action.choices.items():
                    found += [f"{name} {flag}" for flag in flags(made)]
            elif action.option_strings and action.dest != "help":
                found.append(action.option_strings[0])
        return found

    command_line = flags(_parser())
    assert "train --run" in command_line and "data build --out" in command_line
    own = {flag.rpartition(" ")[2] for flag in command_line} - {f"--{f.name}" for _, f in FIELDS}
    assert len(FIELDS) + len(own) <= 100


def test_every_option_is_listed_with_its_meaning() -> None:
    listed = describe_options()
    for table, f in FIELDS:
        assert f"--{table}.{f.name}" in listed
        assert f.metadata["doc"] in listed
