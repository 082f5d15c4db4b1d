import os
import subprocess
import sys

import pytest

from hpcpar.config.job import Submit
from hpcpar.errors import UserError
from hpcpar.submit import stage as staging
from hpcpar.submit.stage import UNPACK, stage


@pytest.fixture
def prefix(tmp_path, monkeypatch):
    """A small environment that looks like the one that runs us."""
    prefix = tmp_path / "venv"
    (prefix / "lib").mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", prefix], check=True)
    site = next(prefix.glob("lib/python3*/site-packages"))
    (site / "only_here.py").write_text("WHERE = __file__\n")
    monkeypatch.setattr(sys, "prefix", str(prefix))
    monkeypatch.setattr(staging.sysconfig, "get_path", lambda name: str(site))
    return prefix


def unpack(archive, folder):
    return subprocess.run(["bash", "-c", UNPACK, "unpack", archive, folder, archive.stem], capture_output=True,
                          check=False)


def test_an_environment_is_packed_once_and_runs_from_where_it_is_unpacked(tmp_path, prefix):
    staged = stage(Submit(stage_env="$SCRATCH"), tmp_path, dry_run=True)
    assert not (tmp_path / ".environments").exists()
    assert stage(Submit(stage_env="$SCRATCH"), tmp_path) == staged
    archive, = (tmp_path / ".environments").iterdir()
    written = archive.stat().st_mtime_ns
    assert stage(Submit(stage_env="$SCRATCH"), tmp_path) == staged
    assert archive.stat().st_mtime_ns == written and (tmp_path / ".environments").stat().st_mode & 0o777 == 0o700
    assert staged.python == f'"$SCRATCH/hpcpar-$USER"/{archive.stem}/bin/python'
    local = tmp_path / "local"
    both = [subprocess.Popen(["bash", "-c", UNPACK, "unpack", archive, local, archive.stem]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0] and unpack(archive, local).returncode == 0
    assert [path.name for path in local.iterdir()] == [archive.stem]  # no leftovers of the second
    prefix.rename(tmp_path / "gone")
    done = subprocess.run([local / archive.stem / "bin/python", "-c", "import only_here; print(only_here.WHERE)"],
                          capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(local))


def test_a_changed_package_makes_another_archive(tmp_path, prefix):
    stage(Submit(stage_env="/tmp"), tmp_path)
    (next(prefix.glob("lib/python3*/site-packages")) / "new.py").touch()
    stage(Submit(stage_env="/tmp"), tmp_path)
    assert len(list((tmp_path / ".environments").iterdir())) == 2


def test_a_folder_of_somebody_else_is_not_unpacked_into(tmp_path, prefix):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    stage(Submit(stage_env="/tmp"), tmp_path)
    archive, = (tmp_path / ".environments").iterdir()
    (tmp_path / "local").mkdir()
    os.chown(tmp_path / "local", 12345, 12345)
    assert unpack(archive, tmp_path / "local").returncode != 0


def test_what_cannot_be_staged_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"has no use with submit\.container"):
        stage(Submit(stage_env="/tmp", container="apptainer exec x.sif"), tmp_path)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    with pytest.raises(UserError, match="is the system's Python"):
        stage(Submit(stage_env="/tmp"), tmp_path)
    assert stage(Submit(container="apptainer exec x.sif"), tmp_path).python == "apptainer exec x.sif python3"
