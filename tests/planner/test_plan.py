from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hpcpar.cli import main
from hpcpar.config.load import to_toml
from hpcpar.errors import UserError
from hpcpar.layout.schedule import make_schedule
from hpcpar.planner.money import best_checkpoint_interval, goodput, total_samples
from hpcpar.planner.picture import draw_plan
from hpcpar.planner.plan import make_plan
from hpcpar.planner.unequal import share_out
from tests.planner.jobs import job_of, mt_nlg, yuan

CONTRACT = {"params", "model_flops", "hardware_flops", "step_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu", "hfu",
            "bubble", "memory_bytes", "memory_by_stage", "fits", "pf_days_model", "pf_days_hardware", "days",
            "gpu_hours", "parts"}


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "yuan.toml"
    path.write_text(to_toml(yuan()), encoding="utf-8")
    return path


def test_json_has_exactly_the_contracts_keys(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(job_file), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert set(plan) == CONTRACT
    assert plan["params"] == 245_734_998_016
    assert plan["pf_days_hardware"] == pytest.approx(4095, abs=1)
    assert plan["pf_days_model"] == pytest.approx(3072, abs=1)
    assert plan["bubble"] == pytest.approx(0.077, abs=0.01)
    assert sum(plan["parts"].values()) == pytest.approx(plan["step_s"])
    assert len(plan["memory_by_stage"]) == 38
    assert plan["memory_bytes"] == max(plan["memory_by_stage"])
    assert plan["fits"]
    assert plan["tflops_per_gpu"] == pytest.approx(plan["mfu"] * 312)
    assert plan["gpu_hours"] == pytest.approx(plan["days"] * 24 * 2128)


def test_the_page_says_what_people_ask(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(job_file), "--efficiency", "0.448", "--submit.price_per_gpu_hour", "2"]) == 0
    page = capsys.readouterr().out
    for words in ("245,734,998,016 parameters", "480 microbatches", "8PT = 4,096", "6PT = 3,072", "13.8 days",
                  "weights", "activations", "logits", "fits", "pipeline bubble", "goodput", "MWh", "a GPU-hour",
                  "(p-1)/(v m) = 7.7%", "checkpoint stall"):
        assert words in page, words


@pytest.mark.parametrize(("name", "chunks"), [("1f1b", 1), ("interleaved", 2), ("zbv", 2)])
@pytest.mark.parametrize("gpu", ["a100-80g", "cores"])
def test_a_users_table_is_foretold_as_the_schedule_that_it_spells(name: str, chunks: int, gpu: str,
                                                                   tmp_path: Path) -> None:
    if gpu == "cores":
        gpu = str(tmp_path / "cores.toml")
        Path(gpu).write_text('base = "cpu"\n[chip]\ncores = 2\n', encoding="utf-8")
    orders = make_schedule(name, 2, 4, chunks).orders
    lines = [" ".join(f"{a.chunk}{a.kind.value}{a.microbatch}" for a in order) for order in orders]
    plans = [make_plan(job_of(8, 256, 8, 1, 2, 1, 4, machine={"gpu": gpu}, layout={"chunks": chunks} | wish))
             for wish in ({"schedule": name}, {"schedule": "table", "table": lines})]
    assert plans[1].time.total == pytest.approx(plans[0].time.total)
    assert plans[1].memory == plans[0].memory
    assert all(path.is_file() for path in draw_plan(plans[1], tmp_path))


def test_pictures_and_a_page(job_file: Path, tmp_path: Path) -> None:
    assert main(["plan", str(job_file), "--plot", str(tmp_path / "plot"), "--layout.pp", "4", "--layout.dp", "1",
                 "--train.global_batch", "16"]) == 0
    for name in ("timeline.png", "memory.png", "parts.png"):
        assert (tmp_path / "plot" / name).read_bytes().startswith(b"\x89PNG")
        assert f'src="{name}"' in (tmp_path / "plot" / "plan.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("words", "said"), [
    (["--layout.tp", "3"], "layout.tp: 3 must divide"), (["--layout.pp", "77"], "layout.pp"),
    (["--machine.gpu", "a100"], "machine.gpu"), (["--train.global_batch", "3361"], "train.global_batch"),
    (["--layout.ep", "2"], "no experts"), (["--layout.cp", "3"], "layout.cp"), (["--ladder", "gpt4"], "--ladder"),
    (["--gpus", "-3"], "--gpus: '-3' is no number above 0"), (["--gpus", "2.5"], "no whole number"),
    (["--search", "--gpus", "0"], "--gpus"), (["--efficiency", "3"], "no share of the peak"),
    (["--tokens", "many"], "--tokens: 'many' is no number"), (["--budget=-4d"], "neither a number nor days"),
    (["--plot", "/proc/nowhere"], "cannot be a folder"),
])
def test_a_refused_job_is_one_line_and_exit_2(job_file: Path, words: list[str], said: str,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(job_file), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("change", [{"zero": 3, "pp": 1, "dp": 266}, {"zero": 2}, {"cp": 2},
                                    {"schedule": "interleaved", "chunks": 2, "pp": 19, "dp": 14}])
def test_what_cannot_be_trained_yet_is_planned_and_train_refuses_it(change: dict[str, object], job_file: Path,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    words = [w for name, value in change.items() for w in (f"--layout.{name}", str(value))]
    batch = ["--train.global_batch", "4256"]
    assert main(["plan", str(job_file), *words, *batch]) == 0
    capsys.readouterr()
    if "cp" in change:
        assert main(["train", str(job_file), *words, *batch]) == 2
        assert "this version only runs" in capsys.readouterr().err


def test_a_job_that_does_not_fit_is_told_what_would(capsys: pytest.CaptureFixture[str], job_file: Path) -> None:
    assert main(["plan", str(job_file), "--layout.recompute", "none", "--train.microbatch", "8"]) == 0
    page = capsys.readouterr().out
    assert "DOES NOT FIT" in page
    assert "would fit: --layout.recompute full" in page or "would fit: --train.microbatch" in page


def test_fewer_bytes_by_zero_and_recomputation() -> None:
    plans = {z: make_plan(job_of(24, 2048, 16, 1, 1, 8, 64, layout={"zero": z})) for z in (0, 1, 2, 3)}
    states = [plans[z].memory[0].states for z in (0, 1, 2, 3)]
    assert states == sorted(states, reverse=True)
    kept = [make_plan(mt_nlg(layout={"recompute": r})).memory[0].activations for r in ("none", "selective", "full")]
    assert kept == sorted(kept, reverse=True)


def test_mt_nlg_scales_as_published() -> None:
    """60.1, 50.2 and 44.4 s on 2240, 2800 and 3360 GPUs: the ratios, which no constant touches."""
    steps = [make_plan(mt_nlg(dp)).time.total for dp in (8, 10, 12)]
    for dp_step, published in zip(steps, (60.1, 50.2, 44.4), strict=True):
        assert dp_step / steps[0] == pytest.approx(published / 60.1, rel=0.05)


def test_weak_scaling_from_256_to_1920_devices() -> None:
    """ERNIE 3.0 Titan, 260B: 91.7% (arXiv 2112.12731)."""
    def rate(dp: int) -> float:
        job = job_of(48, 12288, 192, 8, 8, dp, 128 * dp, model={"ffn": 49152}, machine={"gpu": "v100-32g"},
                     train={"precision": "fp16"})
        return job.train.global_batch / make_plan(job).time.total / job.world_size

    assert 0.9 < rate(30) / rate(4) <= 1.0


def test_best_checkpoint_interval_and_goodput() -> None:
    assert best_checkpoint_interval(30, 6 * 3600) == pytest.approx((2 * 30 * 6 * 3600) ** 0.5)
    best = goodput(30, 0, 6 * 3600, 600)
    assert best.interval_s == best.best_interval_s
    for factor in (0.3, 0.7, 1.5, 4):
        assert goodput(30, best.interval_s * factor, 6 * 3600, 600).share < best.share
    assert goodput(0, 60, 1e12, 0).share == pytest.approx(1)
    assert goodput(30, 600, 60, 600).share == 0  # a failure a minute: nothing lasts


def test_a_ramp_takes_fewer_tokens() -> None:
    job = job_of(12, 768, 12, 1, 1, 1, 100, optim={"ramp": [20, 20, 400]}, train={"steps": 50})
    # 20, 40, 60 and 80 for 100 sequences each: 5 + 2.5 + 1.67 + 1.25 steps
    assert total_samples(job) == pytest.approx(400 + (50 - 10.4167) * 100, rel=1e-4)
    assert total_samples(dataclasses.replace(job, optim=dataclasses.replace(job.optim, ramp=None))) == 5000


def test_two_kinds_share_the_batch_by_speed(tmp_path: Path) -> None:
    """Half of the devices twice as slow: 2/3 of the batch to the others, 4/3 to 1.5 times quicker than evenly."""
    slow = tmp_path / "slow.toml"
    slow.write_text('base = "a100-80g"\n[matmul]\nefficiency = 0.3775\n[attention]\nforward = 0.3\nbackward = 0.25\n'
                    "[chip]\ngb_efficiency = 0.41\nlaunch_us = 10\n[inside]\ngb_per_s = 150\n", encoding="utf-8")
    job = job_of(24, 2048, 16, 1, 1, 4, 96, machine={"nodes": 1})
    shared = share_out(job, (("a100-80g", 4), (str(slow), 4)))
    fast, other = shared.shares
    assert fast.microbatches / other.microbatches == pytest.approx(2, rel=0.1)
    assert 1.25 < shared.even_step_s / shared.step_s < 1.5
    assert fast.microbatches * 4 + other.microbatches * 4 >= 96


def test_a_kind_that_cannot_hold_its_share_is_refused() -> None:
    with pytest.raises(UserError, match="a rank needs"):
        share_out(job_of(32, 4096, 32, 1, 1, 2, 64, layout={"zero": 0}), (("h200", 2), ("v100-32g", 2)))
    with pytest.raises(UserError, match="no whole replicas"):
        share_out(mt_nlg(), (("a100-80g", 2240), ("a100-40g", 100)))


def test_calculators(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "245.73e9", "--tokens", "180e9", "--gpus", "2128", "--efficiency", "0.448"]) == 0
    page = capsys.readouterr().out
    for words in ("4,095.5 PF-days", "3,071.6 PF-days", "13.8 days on 2128", "491.5 GB", "457.7 GiB"):
        assert words in page, words
    assert main(["plan", "--ladder", "gpt3"]) == 0
    assert "3,637.6" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "said"), [
    (["-5"], "no number of parameters"), (["nan"], "no number of parameters"), (["1e9", "--json"], "need a job file"),
    (["1e9", "--submit.price_per_gpu_hour", "x"], "submit.price_per_gpu_hour"), ([], "needs a job file"),
])
def test_bad_sums_are_one_line_and_exit_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_planner_needs_no_torch() -> None:
    code = ("import sys, hpcpar.planner.search, hpcpar.planner.shapes, hpcpar.planner.report; "
            "print([m for m in ('torch', 'mpi4py', 'h5py') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_many_nodes_are_told_to_shard_inside_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 13B on 1024 GPUs: gathering over all of them takes longer than a node's copy and a sum across nodes."""
    words = ["plan", "jobs/llama-2-13b.toml", "--layout.tp", "1", "--layout.pp", "1", "--layout.dp", "1024",
             "--machine.gpu", "h100-80g", "--machine.nodes", "128", "--machine.gpus_per_node", "8",
             "--train.global_batch", "1024", "--train.microbatch", "1", "--layout.recompute", "selective"]
    assert main(words) == 0
    assert "would fit: --layout.zero [3,8]" in capsys.readouterr().out
    seconds = {}
    for zero in ("3", "[3,8]"):
        assert main([*words, "--json", "--layout.zero", zero]) == 0
        seconds[zero] = json.loads(capsys.readouterr().out)["step_s"]
    assert seconds["[3,8]"] < 0.8 * seconds["3"]
