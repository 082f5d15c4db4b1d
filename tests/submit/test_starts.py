import os
from pathlib import Path

import pytest

from hpcpar.config.run_folder import RunFolder
from hpcpar.errors import UserError
from hpcpar.submit.environment import clean, without_launchers
from hpcpar.submit.starts import Starts, check_private
from hpcpar.submit.tasks import remove_stale_segments


@pytest.fixture
def starts(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.submission.mkdir()
    return Starts(folder)


def publish(starts, step):
    path = starts.folder.checkpoints / f"step-{step:08d}"
    path.mkdir()
    (path / "manifest.json").touch()


def test_starts_without_a_new_set_are_counted(starts):
    assert starts.fruitless() == 0 and starts.newest_step() is None
    for _ in range(2):
        starts.note(job="7", nodes=["n1"])
        starts.note(job="7", end=9)
    assert starts.fruitless() == 2
    publish(starts, 100)
    assert starts.fruitless() == 0  # the last start has saved something new
    starts.note(job="7", nodes=["n1"])
    (starts.folder.checkpoints / "step-00000200").mkdir()  # not published
    assert starts.fruitless() == 1 and starts.newest_step() == 100


def test_a_line_cut_off_by_a_dying_node_is_left_out(starts):
    starts.note(job="7", nodes=["n1"])
    with (starts.folder.submission / "starts.jsonl").open("a") as file:
        file.write('{"time": 12, "no')
    assert [line["job"] for line in starts.lines()] == ["7"]


def test_bad_nodes_are_remembered_once_and_may_be_forgiven(starts):
    starts.add_bad_nodes({"n1": "rank 3: killed by SIGKILL", "n2": "down"})
    starts.add_bad_nodes({"n1": "again"})
    assert starts.bad_nodes() == {"n1": "rank 3: killed by SIGKILL", "n2": "down"}
    (starts.folder.submission / "bad-nodes").write_text("n2 down\n")
    assert starts.bad_nodes() == {"n2": "down"}


def test_an_older_starts_failure_is_not_this_ones(starts):
    starts.folder.failure.write_text('{"rank": 1}')
    written = starts.folder.failure.stat().st_mtime
    assert starts.failure(written - 1) == {"rank": 1} and starts.failure(written + 1) is None


@pytest.mark.parametrize("what", ["folder", "pickle", "owner"])
def test_where_others_can_write_nothing_is_loaded(starts, what):
    folder = starts.folder.submission
    pickle = folder / "1_submitted.pkl"
    pickle.touch(mode=0o600)
    folder.chmod(0o700)
    check_private(folder)
    if what == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(pickle, 12345, 12345)
    else:
        (folder if what == "folder" else pickle).chmod(0o770)
    with pytest.raises(UserError, match="can be written by others"):
        check_private(folder)


def test_launchers_variables_are_kept_out_and_put_back():
    environment = {"SLURM_JOB_ID": "1", "SLURM_CONF": "c", "PMI_RANK": "2", "SBATCH_X": "3", "HOME": "h"}
    before = dict(environment)
    with pytest.raises(ZeroDivisionError), clean(environment, NEW="n"):
        assert environment == {"SLURM_CONF": "c", "HOME": "h", "NEW": "n"}
        raise ZeroDivisionError
    assert environment == before and without_launchers(before) == {"SLURM_CONF": "c", "HOME": "h"}


def test_only_segments_that_nobody_maps_are_removed(tmp_path):
    import mmap

    for name in ("mpich_shm_a_0", "mpich_shm_b_0", "mpich_shm_c_0", "other_a"):
        (tmp_path / name).write_bytes(b"x" * mmap.PAGESIZE)
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / "mpich_shm_c_0").touch()  # just made, perhaps not mapped yet
    with (tmp_path / "mpich_shm_b_0").open("r+b") as file, mmap.mmap(file.fileno(), 0):
        remove_stale_segments(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mpich_shm_b_0", "mpich_shm_c_0", "other_a"]


def test_a_segment_that_somebody_else_removes_meanwhile_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "mpich_shm_a_0").touch()
    os.utime(tmp_path / "mpich_shm_a_0", (1, 1))
    glob = Path.glob
    gone = [tmp_path / "mpich_shm_gone_0"]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [*gone, *glob(self, pattern)] if self == tmp_path
                        else glob(self, pattern))
    remove_stale_segments(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_segment_that_was_made_anew_while_maps_were_read_stays(tmp_path, monkeypatch):
    segment = tmp_path / "mpich_shm_a_0"
    segment.touch()
    os.utime(segment, (1, 1))
    glob = Path.glob

    def make_anew_first(self, pattern):
        if self == Path("/proc"):
            segment.unlink()
            segment.touch()
        return glob(self, pattern)

    monkeypatch.setattr(Path, "glob", make_anew_first)
    remove_stale_segments(tmp_path)
    assert segment.exists()
