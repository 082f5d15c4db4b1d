"""hpcpar ckpt as a user types it, on sets that threads saved; only the last test trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hpcpar.checkpoint import Manifest, latest_set, read_manifest, save_set
from hpcpar.cli import main
from hpcpar.config.job import Job
from hpcpar.config.load import to_toml
from hpcpar.config.resolve import resolve
from hpcpar.layout.layout import Layout
from hpcpar.train.preflight import open_order
from tests.checkpoint.sets import GPT, make_layout, on_ranks, save, shards_of
from tests.train.small import make_job, make_store

SHARD = "shard-00001.h5"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run folder with sets of three steps, each saved on another layout."""
    monkeypatch.setenv("COLUMNS", "200")
    for step, cut in ((10, (2, 1, 2)), (20, (1, 3, 1)), (30, (2, 1, 2))):
        save(tmp_path / "checkpoints", step, make_layout(GPT, *cut))
    yield tmp_path


def spoil(path: Path, at: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_ls_names_sets_and_what_is_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = run / "checkpoints"
    spoil(checkpoints / "step-00000020" / "manifest.json")
    (checkpoints / ".step-00000040.tmp").mkdir()
    assert main(["ckpt", "ls", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step-00000010", "step-00000020", "step-00000030",
                                                   ".step-00000040.tmp"]
    assert "5 files" in lines[0] and "DAMAGED" in lines[1] and "being written" in lines[3]
    assert main(["ckpt", "ls", str(checkpoints)]) == 0
    assert main(["ckpt", "ls", str(run / "none")]) == 2


def test_show_draws_who_wrote_what(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ckpt", "show", str(run)]) == 0
    said = capsys.readouterr().out
    manifest = read_manifest(latest_set(run / "checkpoints"))
    elements = sum(np.prod(shape) for shape in manifest.tensors.values())
    assert f"{len(manifest.tensors)} of" in said and "kinds    weight float32, exp_avg float32" in said
    line = next(line for line in said.splitlines() if "layers.0-2.attention.q.weight" in line)
    assert "16 x 16" in line and "9.0 KiB" in line  # 3 layers x 256 elements x 4 bytes x 3 kinds
    assert f"{12 * elements / 1024:.1f} KiB in all kinds" in said
    assert all(file.name in said for file in manifest.files) and "by rank 3" in said
    assert main(["ckpt", "show", str(run / "checkpoints" / "step-00000010"), "embedding.token.weight"]) == 0
    picture = capsys.readouterr().out.splitlines()
    rows = [line.strip() for line in picture[1:17]]
    boxes = [box for file in manifest.files for name, box in file.boxes if name == "embedding.token.weight"]
    assert {len(row) for row in rows} == {16} and "?" not in "".join(rows)
    assert set("".join(rows)) == {line.split()[0] for line in picture[17:]} and len(picture) == 17 + len(boxes)
    assert main(["ckpt", "show", str(run), "embedding.token.wieght"]) == 2
    assert "did you mean embedding.token.weight?" in capsys.readouterr().err


def test_verify_names_file_and_tensors_and_ends_with_3(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints" / "step-00000030"
    assert main(["ckpt", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": whole (") == 3
    spoil(path / SHARD)
    (run / "checkpoints" / "step-00000020" / "manifest.json").write_text("{}")
    assert main(["ckpt", "verify", str(run)]) == 3
    out, err = capsys.readouterr()
    assert "step-00000010: whole" in out and "step-00000020: DAMAGED" in out
    assert f"{SHARD} holds other bytes" in out and "layers.1-2.mlp.up.bias" in out
    assert err.startswith("hpcpar: 2 of 3 sets damaged: ") and f"step-00000030 ({SHARD})" in err
    assert main(["ckpt", "verify", str(path)]) == 3
    (path / "model.h5").unlink()
    capsys.readouterr()
    assert main(["ckpt", "verify", str(path)]) == 3
    assert "model.h5 is missing; tensors hit: none (the index)" in capsys.readouterr().out


def test_diff_names_the_first_difference_and_its_size(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = run / "checkpoints"
    a, b = checkpoints / "step-00000010", checkpoints / "step-00000020"
    assert main(["ckpt", "diff", str(a), str(b)]) == 0  # other layouts, same values
    assert "hold the same values" in capsys.readouterr().out
    layout = make_layout(GPT, 1, 1, 2)

    def changed(rank: int) -> dict[str, list[np.ndarray]]:
        """Change exp_avg of layers.1.mlp.up.weight at [5, 7] by 0.25, and at [0, 0] to NaN in both moments."""
        shards = shards_of(layout, rank)
        for piece in layout.held_pieces(rank):
            if piece.parameter.name == "layers.1.mlp.up.weight":
                for kind, element, value in (("exp_avg", (5, 7), 0.25), ("exp_avg_sq", (0, 0), np.nan)):
                    inside = [e - o for e, o in zip(element, piece.box.offset, strict=True)]
                    if all(0 <= i < s for i, s in zip(inside, piece.box.size, strict=True)):
                        at = piece.start + int(np.ravel_multi_index(inside, piece.box.size))
                        shards[kind][piece.bucket][at] += np.float32(value)
        return shards

    on_ranks(2, lambda c: save_set(checkpoints, 40, layout, c.rank, c, changed(c.rank), {}))
    assert main(["ckpt", "diff", str(a), str(checkpoints / "step-00000040")]) == 3
    first, second, total = capsys.readouterr().out.splitlines()
    assert first.startswith("FIRST DIFFERENCE: exp_avg layers.1.mlp.up.weight: 1 of 1,024 elements differ; most at "
                            "[5, 7]: ") and "absolute 0.25," in first
    assert "exp_avg_sq layers.1.mlp.up.weight: 1 of 1,024 elements differ; most at [0, 0]" in second
    assert "and nan, absolute inf" in second and total == "2 tensors differ"
    save(checkpoints, 50, make_layout({**GPT, "vocab": 60}))
    assert main(["ckpt", "diff", str(a), str(checkpoints / "step-00000050")]) == 3
    assert "FIRST DIFFERENCE: weight embedding.token.weight: is [53, 16] in the first, is [60, 16] in the second" in (
        capsys.readouterr().out)
    spoil(a / SHARD)
    assert main(["ckpt", "diff", str(a), str(b)]) == 3
    assert SHARD in capsys.readouterr().err


def test_diff_reads_in_chunks(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from hpcpar.checkpoint import compare

    monkeypatch.setattr(compare, "CHUNK_ELEMENTS", 7)
    boxes = list(compare.chunks(compare.whole((5, 3, 4)), 7))
    seen = np.zeros((5, 3, 4), int)
    for box in boxes:
        assert box.numel <= 7
        seen[box.slices()] += 1
    assert (seen == 1).all() and list(compare.chunks(compare.whole((0, 4)))) == [compare.whole((0, 4))]
    a, b = (str(run / "checkpoints" / f"step-000000{step}") for step in (10, 20))
    assert main(["ckpt", "diff", a, b]) == 0


def test_prune_never_deletes_the_newest_that_is_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = run / "checkpoints"
    spoil(checkpoints / "step-00000030" / SHARD)
    spoil(checkpoints / "step-00000020" / "manifest.json")
    assert main(["ckpt", "prune", str(run), "1"]) == 0
    assert "deleted 1 sets; the newest that is whole is step-00000010" in capsys.readouterr().out
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000010", "step-00000030"]
    spoil(checkpoints / "step-00000010" / SHARD)
    assert main(["ckpt", "prune", str(run), "1"]) == 3
    assert "nothing was deleted" in capsys.readouterr().err and len(list(checkpoints.iterdir())) == 2
    assert main(["ckpt", "prune", str(run), "0"]) == 2


def test_rewind_moves_newer_sets_aside_and_deletes_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = run / "checkpoints"
    assert main(["ckpt", "rewind", str(run), "step-00000015"]) == 2
    spoil(checkpoints / "step-00000020" / SHARD)
    assert main(["ckpt", "rewind", str(run), "step-00000020"]) == 3
    assert len(list(checkpoints.iterdir())) == 3
    for _ in range(2):
        assert main(["ckpt", "rewind", str(run), "step-00000010"]) == 0
        assert latest_set(checkpoints) == checkpoints / "step-00000010"
        save(checkpoints, 20, make_layout(GPT))
    assert sorted(p.name for p in checkpoints.iterdir()) == [
        "step-00000010", "step-00000020", "step-00000020.aside", "step-00000020.aside-1", "step-00000030.aside"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with a set every 2."""
    folder = tmp_path_factory.mktemp("ckpt")
    job = make_job(make_store(folder), train={"precision": "fp32", "steps": 4}, checkpoint={"every": 2, "keep": 0})
    (folder / "job.toml").write_text(to_toml(job))
    assert main(["train", str(folder / "job.toml"), "--run", str(folder / "run")]) == 0
    return folder


@pytest.mark.parametrize(("words", "option", "allowed"), [
    ("--layout.tp 4 --layout.dp 2 --layout.zero 0", "layout.tp", True), ("--layout.pp 4", "layout.pp", True),
    ("--train.precision fp64", "train.precision", True), ("--train.microbatch 2", "train.microbatch", True),
    ("--train.global_batch 16", "train.global_batch", True), ("--optim.lr 0.1", "optim.lr", True),
    ("--model.dropout 0", "model.dropout", True), ("--model.layers 5", "model.layers", False),
    ("--train.seed 2", "train.seed", False), ("--data.validation 0.2", "data.validation", False),
])
def test_check_says_what_may_change(trained: Path, capsys: pytest.CaptureFixture[str], words: str, option: str,
                                    allowed: bool) -> None:
    job = str(trained / "job.toml")
    assert main(["ckpt", "check", job, str(trained / "run"), *words.split()]) == (0 if allowed else 2)
    out, err = capsys.readouterr()
    assert f"{'may change' if allowed else 'MUST NOT'}  {option}: " in out
    if allowed:
        changed = dict(zip(words.split()[::2], words.split()[1::2], strict=True))
        size = np.prod([int(changed.get(f"--layout.{axis}", 1)) for axis in ("tp", "pp", "dp")])
        assert "can go on from" in out and f"each of {size} ranks reads" in out
    else:
        assert err.startswith(f"hpcpar: {option}: ") and "another --run folder" in err


def test_every_table_of_a_job_has_a_rule() -> None:
    from hpcpar.train.resume import RULES

    tables = {field.name for field in dataclasses.fields(Job)}
    assert tables <= {name for name, _ in RULES} and {name.partition(".")[0] for name, _ in RULES} == tables


def test_check_tells_the_bytes_that_are_read(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest: Manifest = read_manifest(latest_set(trained / "run" / "checkpoints"))
    assert main(["ckpt", "check", str(trained / "job.toml"), str(trained / "run")]) == 0
    total = sum(12 * np.prod(shape) for shape in manifest.tensors.values())
    assert f"each of 1 ranks reads {total / 1024:.1f} KiB to" in capsys.readouterr().out


def test_train_offers_the_newest_whole_set_and_goes_on_only_when_told(
        trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job, run = str(trained / "job.toml"), trained / "run"
    command = ["train", job, "--run", str(run)]
    shard = run / "checkpoints" / "step-00000004" / "shard-00000.h5"
    metrics = (run / "metrics.jsonl").read_text()
    spoil(shard)
    with pytest.raises(SystemExit, match="2"):
        main(command)
    err = capfd.readouterr().err
    assert "step-00000004: the newest set is damaged" in err and "shard-00000.h5 holds other bytes" in err
    assert "tensors hit: embedding.position.weight" in err and not (run / "failure.json").exists()
    offered = err.rpartition("to go on from step-00000002: hpcpar ")[2].split()
    assert offered == ["ckpt", "rewind", str(run), "step-00000002"]
    assert (run / "metrics.jsonl").read_text() == metrics and shard.exists()
    assert main(offered) == 0
    assert main(command) == 0
    assert "resumed step-00000002" in capfd.readouterr().out
    spoil(run / "checkpoints" / "step-00000002" / "shard-00000.h5")
    spoil(shard)
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "no other set is whole" in capfd.readouterr().err


def test_a_new_precision_begins_with_a_fresh_loss_scale(trained: Path) -> None:
    from hpcpar.train.resume import saved_progress
    from hpcpar.train.state import Progress

    job = resolve(make_job(trained / "store"))
    progress = Progress(step=7, samples=56, updates=6, loss_scale=4.0, finite_steps=3)
    state = {"progress": progress.as_dict(), "job": dataclasses.asdict(job), "data": open_order(job).fingerprint}
    assert saved_progress(state, job, Progress(loss_scale=512.0)) == progress
    state["job"]["train"]["precision"] = "fp16"
    fresh = saved_progress(state, job, Progress(loss_scale=512.0))
    assert fresh == dataclasses.replace(progress, loss_scale=512.0, finite_steps=0)
    assert Layout(job).mesh.size == 1
