"""The door: what is wrong is said in one line on stderr, with exit code 2 and no traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpcpar.cli import main
from hpcpar.config.load import load_job

DEMO = Path(__file__).parents[1] / "jobs" / "demo.toml"


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if started by hand in an empty folder, wherever the tests run."""
    for name in list(os.environ):
        if name.startswith(("PMI", "OMPI_", "SLURM_", "HPCPAR_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write(text: str) -> str:
    Path("job.toml").write_text(text)
    return "job.toml"


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("hpcpar: ") and err.endswith("\n") and err.count("\n") == 1
    assert "Traceback" not in err
    return err.removeprefix("hpcpar: ").strip()


@pytest.mark.parametrize(("argv", "words"), [
    ([], ["COMMAND", "see hpcpar --help"]),
    (["trian"], ["'trian'", "'train'", "see hpcpar --help"]),
    (["data"], ["ACTION", "see hpcpar data --help"]),
    (["data", "biuld"], ["'biuld'", "'build'"]),
    (["data", "build", "x"], ["--out"]),
    (["data", "build", "x", "--out", "y", "--vocab", "many"], ["--vocab", "'many'"]),
    (["train"], ["job", "see hpcpar train --help"]),
    (["generate", "run", "--tokens", "few"], ["--tokens", "'few'"]),
    (["generate", "run", "--layout.tp", "2"], ["--layout.tp", "is not an option of this command"]),
    (["generate", "run", "--tokens", "-5"], ["--tokens", "'-5' is no number above 0"]),
    (["parity", "job.toml", "0"], ["steps", "'0' is no number above 0"]),
    (["plan", "job.toml", "--serach"], ["--serach; did you mean --search?"]),
    (["plan", "job.toml", "--tokens", "5e9"], ["--tokens: goes with a number of parameters"]),
    (["options", "--all"], ["unrecognized arguments: --all"]),
    (["submit", "job.toml", "--executor", "pbs"], ["--executor", "'pbs'", "'slurm'"]),
])
def test_a_wrong_command_line(capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]) -> None:
    said = refused(capsys, *argv)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("command", ["train", "show", "parity"])
def test_wrong_jobs(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert refused(capsys, command, "none.toml").startswith("none.toml: cannot read the job file: No such file")
    assert refused(capsys, command, write("[model\n")).startswith("job.toml: is not TOML")
    assert refused(capsys, command, write("[modle]\n")) == "modle: unknown table; did you mean model?"
    assert refused(capsys, command, write("layers = 2\n")) == "layers: stands in no table; write it under [model]"
    assert refused(capsys, command, write("every = 2\n")).startswith("every: stands in no table; write it under [che")
    assert refused(capsys, command, write("[model]\nheads = 5\n")).startswith("model.heads: 5 does not divide")
    assert refused(capsys, command, write(""), "--model.layer", "3").startswith("--model.layer: unknown option")
    assert refused(capsys, command, write(""), "--model.layers").startswith("--model.layers: has no value")
    assert refused(capsys, command, write(""), "--model.layers", "many").startswith('model.layers: is "many", must be')


@pytest.mark.parametrize("command", ["train", "parity"])
def test_a_world_of_another_size(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    assert "tp 2 x pp 2 x dp 1 = 4, but 1 rank was started; start 4 ranks" in refused(capsys, command, str(DEMO))
    monkeypatch.setenv("PMI_SIZE", "6")
    monkeypatch.setenv("PMI_RANK", "0")
    assert "but 6 ranks were started" in refused(capsys, command, str(DEMO))


def test_of_many_ranks_only_the_first_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpcpar.cli.time.sleep", lambda seconds: None)
    monkeypatch.setenv("PMI_SIZE", "6")
    monkeypatch.setenv("PMI_RANK", "5")
    assert main(["train", str(DEMO)]) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("argv", [["train", "job.toml"], ["parity", "job.toml"], ["data", "show", "none/store"]])
def test_a_missing_store(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    write('[data]\nstore = "none/store"\n')
    assert "none/store" in refused(capsys, *argv)
    assert not Path("runs").exists()


def test_missing_texts_and_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.txt" in refused(capsys, "data", "build", "none.txt", "--out", "store")
    assert "none: has no published checkpoint" in refused(capsys, "generate", "none")
    assert "not a run folder" in refused(capsys, "show", str(DEMO), "--plot")


def test_an_override_may_stand_before_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "--layout.tp", "4", "--layout.pp=1", str(DEMO)]) == 0
    assert "4 = pp 1 x dp 1 x tp 4" in capsys.readouterr().out


def test_show_an_empty_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert "cannot read the job file" in refused(capsys, "show", "empty")


def test_show_prints_the_job_its_parameters_and_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(DEMO), "--schedule"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    model = load_job(DEMO).model
    h, layers = model.hidden, model.layers
    count = 12 * layers * h**2 + 13 * layers * h + (model.vocab + model.seq) * h + 2 * h
    assert any(line.split()[:2] == ["parameters", f"{count:,}"] for line in lines)
    assert any("4 = pp 2 x dp 1 x tp 2" in line for line in lines)
    assert [line.split()[1] for line in lines if line.startswith("stage ") and "layers" in line] == ["0", "1"]
    assert "stage 0  F0 F1 .. B0 F2 B1 F3 B2 .. B3" in out
    assert "dp = 1" in lines and "kv_heads = 8" in lines


def test_show_draws_pipelines_that_are_on_paper_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(DEMO), "--schedule", "pipedream"]) == 0
    out = capsys.readouterr().out
    assert "stage 0  keeps 2 versions of its weights; gradients are 1 behind" in out
    assert "on paper only" in out
    said = refused(capsys, "show", str(DEMO), "--layout.schedule", "pipedream")
    assert "it is on paper only, no rank plays it" in said


def test_a_table_of_the_users_own(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.csv").write_text("0F0,0F1,0B0,0F2,0B1,0F3,0B2,0B3\n1F0,1B0,1F1,1B1,1F2,1B2,1F3,1B3\n")
    wish = ["show", str(DEMO), "--schedule", "--layout.schedule", "table", "--layout.table", "mine.csv"]
    assert main(wish) == 0
    assert "stage 0  F0 F1 .. B0 F2 B1 F3 B2 .. B3" in capsys.readouterr().out
    Path("mine.csv").write_text("0F0,0B0,0F1,0B1,0F2,0B2,0F3,0B3\n1F1,1B1,1F0,1B0,1F2,1B2,1F3,1B3\n")
    said = refused(capsys, *wish)
    assert "layout.table: cannot be played: schedule deadlocks: rank 0 at 0B0 for 1I0, rank 1 at 1F1 for 0F1" in said


def test_show_takes_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(DEMO), "--layout.pp", "4", "--layout.tp=1"]) == 0
    assert "4 = pp 4 x dp 1 x tp 1" in capsys.readouterr().out


def test_options_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options"]) == 0
    assert "--layout.tp" in capsys.readouterr().out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert all(command in said for command in ("train", "show", "generate", "parity", "submit", "options", "data"))


def test_tokens_are_written_as_people_write_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "175e9", "--tokens", "300B"]) == 0
    said = capsys.readouterr().out
    assert main(["plan", "175B", "--tokens", "300e9"]) == 0
    assert capsys.readouterr().out == said


def test_a_run_folder_that_cannot_be_one(capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text("rank stage tensor shard " * 100)
    assert main(["data", "build", "text.txt", "--out", "store", "--vocab", "300"]) == 0
    capsys.readouterr()
    write('[model]\nlayers = 1\nhidden = 8\nheads = 2\nseq = 8\nvocab = 300\n[data]\nstore = "store"\n'
          '[train]\nglobal_batch = 1\nprecision = "fp32"\n')
    for place in ("text.txt", "text.txt/x"):
        said = refused(capsys, "train", "job.toml", "--run", place)
        assert said.startswith(f"--run: {place} cannot be a run folder: text.txt: ") and "; give a folder of" in said


@pytest.mark.skipif(shutil.which("setpriv") is None or os.geteuid() != 0, reason="wants setpriv, as root")
def test_a_missing_permission_is_one_line() -> None:
    Path("locked/checkpoints").mkdir(parents=True)
    Path("locked").chmod(0)
    for words in (["status", "locked"], ["ckpt", "ls", "locked"], ["generate", "locked"]):
        done = subprocess.run(["setpriv", "--bounding-set", "-dac_override,-dac_read_search", sys.executable, "-m",
                               "hpcpar.cli", *words], capture_output=True, text=True, timeout=100)
        assert done.returncode == 2 and done.stdout == "", done
        assert done.stderr.startswith("hpcpar: locked") and done.stderr.count("\n") == 1
        assert "Permission denied; give a path" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_under_what_is_printed() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "hpcpar.cli", "options"], stdout=full, stderr=subprocess.PIPE,
                              text=True, timeout=100)
    assert done.returncode == 3
    assert done.stderr == "hpcpar: No space left on device; free space there, or choose another place\n"
