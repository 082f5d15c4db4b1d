import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hpcpar.config.load import load_job
from hpcpar.errors import UserError
from hpcpar.submit.slurm import Request, submit
from hpcpar.submit.snapshot import source_sha256, take_snapshot

LEAKED = {"SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_JOB_ID": "7", "SBATCH_PARTITION": "elsewhere", "PMI_RANK": "3",
          "PMI_SIZE": "9", "PMIX_RANK": "3", "OMPI_COMM_WORLD_SIZE": "9"}
SUBMIT = """
import os, sys
from pathlib import Path
from hpcpar.submit.slurm import Request, submit
before = dict(os.environ)
done = submit(Path("small.toml"), {overrides}, Path("run"), os.environ, Request({executor!r}, dry_run={dry}))
assert dict(os.environ) == before, "the caller's environment has changed"
assert not [m for m in ("torch", "mpi4py", "mpi4py.MPI") if m in sys.modules]
"""


def told(run: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(run.glob("told-*.json"))]


def test_dry_run_writes_the_script_and_needs_no_slurm(tmp_path, python, job_file):
    python(SUBMIT.format(overrides=["--layout.dp", "2"], executor="slurm", dry=True) + "assert done.job_id == ''",
           PATH="/nowhere", **LEAKED)
    script = (tmp_path / "run/submit/dry-run.sh").read_text()
    for option in ("nodes=2", "ntasks-per-node=2", "time=5", "signal=USR2@60", "requeue", "open-mode=append",
                   "cpus-per-task=1"):
        assert f"#SBATCH --{option}" in script.splitlines()
    assert "export FROM_SETUP=yes" in script.splitlines()
    assert "--mpi=pmi2 --kill-on-bad-exit=1 --distribution=block --cpus-per-task=1" in script
    assert "elsewhere" not in script and "partition" not in script and "gpus" not in script
    exports = [line for line in script.splitlines() if line.startswith("export")]
    assert str(tmp_path / "run/submit/code-") in exports[1]  # after the user's own lines
    assert subprocess.run(["bash", "-n", tmp_path / "run/submit/dry-run.sh"], check=False).returncode == 0
    assert load_job(tmp_path / "run/submit/job.toml").layout.dp == 2
    assert (tmp_path / "run/submit").stat().st_mode & 0o777 == 0o700
    assert not list((tmp_path / "run/submit").glob("*.pkl"))


def test_without_sbatch_a_submission_is_refused(tmp_path, job_file):
    with pytest.raises(UserError, match=r"sbatch: is not installed here.*--dry-run"):
        submit(job_file, [], tmp_path / "run", {"PATH": "/nowhere"})
    assert not (tmp_path / "run").exists()


def test_a_job_of_another_size_is_refused_before_anything_is_written(tmp_path, job_file):
    rule = r"= 8 ranks, but \[machine\] has 2 nodes x 2 a node = 4; give --machine.nodes 4"
    with pytest.raises(UserError, match=rule):
        submit(job_file, ["--layout.dp", "4"], tmp_path / "run", {}, Request(dry_run=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("depend", ["abc", "afterok", "afterok:", "afterok:12,", "12;rm", "12 13", "begin:12"])
def test_a_dependency_that_sbatch_would_refuse(tmp_path, job_file, depend):
    with pytest.raises(UserError, match=r"--depend: .* names no job; give a number"):
        submit(job_file, [], tmp_path / "run", {}, Request(dry_run=True, depend=depend))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("depend", ["12", "afterok:12:13", "afterany:12_3,afternotok:4_*", "singleton",
                                    "after:12+5?afterok:9"])
def test_a_dependency_that_sbatch_takes(tmp_path, job_file, depend):
    submit(job_file, [], tmp_path / "run", {}, Request(dry_run=True, depend=depend))
    said = (tmp_path / "run/submit/dry-run.sh").read_text()
    assert f"dependency={'afterany:12' if depend == '12' else depend}" in said.replace("'", "")


def test_a_store_that_is_not_there_is_told(tmp_path, job_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = submit(job_file, ["--data.store", "stores/mine"], tmp_path / "run", {}, Request(dry_run=True))
    assert any(note.startswith("data.store: stores/mine is not there from here") for note in done.notes)
    (tmp_path / "stores/mine").mkdir(parents=True)
    done = submit(job_file, ["--data.store", "stores/mine"], tmp_path / "run", {}, Request(dry_run=True))
    assert not any("data.store" in note for note in done.notes)


def test_a_profile_that_cannot_be_read_is_named_by_its_flag(tmp_path, job_file):
    with pytest.raises(UserError, match=r"--cluster: none.toml: cannot read it: No such file"):
        submit(job_file, [], tmp_path / "run", {}, Request(dry_run=True, cluster=Path("none.toml")))


@pytest.mark.parametrize("executor", ["local", "debug"])
def test_local_runs_mpirun_with_the_frozen_code_in_a_clean_environment(tmp_path, python, job_file, source, executor):
    python(SUBMIT.format(overrides=["--layout.dp", "2"], executor=executor, dry=False) + """
Path("source/hpcpar/cli.py").write_text("raise SystemExit('the edited source ran')")
assert done.jobs[0].result() == 0
""", **LEAKED, HPCPAR_KEPT="yes")
    ranks = told(tmp_path / "run")
    assert [rank["world"] for rank in ranks] == [[0, 1, 2, 3]] * 4
    run = tmp_path / "run"
    for rank in ranks:
        assert rank["words"] == ["train", f"{run}/submit/job.toml", "--run", str(run)] and not rank["torch"]
        assert rank["file"].startswith(f"{run}/submit/code-")
        environment = rank["environment"]
        assert environment["FROM_SETUP"] == environment["HPCPAR_KEPT"] == "yes"
        assert environment["PMI_SIZE"] == "4"  # mpirun's own
        assert not [name for name in LEAKED if name in environment and not name.startswith("PMI_")]
    if executor == "local":
        code = next(run.glob("submit/code-*"))
        assert (code / "SHA256").read_text().strip() == source_sha256(code / "hpcpar")


def test_one_rank_needs_no_mpirun(tmp_path, python, job_file):
    python(SUBMIT.format(overrides=["--layout.tp", "1"], executor="local", dry=True), PATH="/nowhere")
    assert "mpirun -n" not in (tmp_path / "run/submit/local.sh").read_text()


def test_exit_codes_come_back(tmp_path, python, job_file):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/code").write_text("75")
    python(SUBMIT.format(overrides=[], executor="local", dry=False) + "assert done.jobs[0].result() == 75")
    (tmp_path / "run/code").write_text("3")
    python(SUBMIT.format(overrides=[], executor="debug", dry=False) + """
try:
    done.jobs[0].result()
except SystemExit as leave:
    assert leave.code == 3
else:
    raise AssertionError
""")


def test_a_stop_signal_reaches_the_ranks(tmp_path, python, source, job_file):
    (source / "cli.py").write_text("""
import signal, time, pathlib
def main(words):
    from mpi4py import MPI
    run, seen = pathlib.Path(words[-1]), []
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    MPI.COMM_WORLD.Barrier()
    (run / f"ready-{MPI.COMM_WORLD.rank}").touch()
    end = time.monotonic() + 30
    while not seen and time.monotonic() < end:
        time.sleep(0.02)
    return 75 if seen else 3
""")
    pid = int(python(SUBMIT.format(overrides=[], executor="local", dry=False) + "print(done.job_id)"))
    run, end = tmp_path / "run", time.monotonic() + 30
    while len(list(run.glob("ready-*"))) < 2:
        assert time.monotonic() < end, next(run.glob("submit/*.out")).read_text()
        time.sleep(0.05)
    os.kill(pid, signal.SIGTERM)  # submitit's controller hands it to LocalTask
    while not list(run.glob("submit/*_result.pkl")):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "completed successfully" in (run / f"submit/{pid}_0_log.out").read_text()


def test_the_same_source_gives_the_same_snapshot_and_another_source_another(tmp_path, source):
    beneath = tmp_path / "beneath"
    beneath.mkdir()
    first = take_snapshot(source, beneath)
    assert take_snapshot(source, beneath) == first and first.sha256 == source_sha256(source)
    (first.folder / "hpcpar/cli.py").write_text("tampered")
    assert take_snapshot(source, beneath) == first and "tampered" not in (first.folder / "hpcpar/cli.py").read_text()
    (source / "cli.py").write_text("WHO = 'second'\n")
    second = take_snapshot(source, beneath)
    assert second.folder != first.folder and len(list(beneath.iterdir())) == 2
    shutil.rmtree(first.folder)
