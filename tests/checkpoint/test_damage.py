import fcntl
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

import hpcpar.checkpoint.publish as publish_module
import hpcpar.checkpoint.read as read_module
import hpcpar.checkpoint.tasks as tasks_module
from hpcpar.checkpoint import (
    latest_set,
    load_shards,
    load_tensor,
    published_sets,
    read_manifest,
    read_state,
    verify_set,
    verify_together,
)
from hpcpar.errors import CheckpointError
from tests.checkpoint.damage import check_one
from tests.checkpoint.sets import GPT, assert_equal, make_layout, on_ranks, save, shards_of, try_save


def test_damages_are_reported_before_libhdf5_opens_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of `make damage-checkpoint`."""
    good = save(tmp_path / "good", 1, make_layout(GPT, 2, 1, 2))
    monkeypatch.setattr(read_module, "open_hdf5", lambda path: pytest.fail(f"libhdf5 opened {path}"))
    dice, layout = random.Random(3), make_layout(GPT)
    found = {check_one(good, layout, dice)[:2] for _ in range(120)}
    assert len(found) > 12 and {file for _, file in found} == {"manifest.json", "model.h5", "shard.h5"}


def test_the_newest_set_damaged_is_said_and_the_older_one_offered(tmp_path: Path) -> None:
    layout = make_layout(GPT)
    assert latest_set(tmp_path / "none") is None and latest_set(tmp_path) is None
    old, new = save(tmp_path, 1, layout), save(tmp_path, 2, layout)
    assert latest_set(tmp_path) == new and read_state(new) == {"step": 2}
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-00000009").write_text("not a folder")
    assert published_sets(tmp_path) == [old, new]
    (new / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"go on from step-00000001: hpcpar ckpt rewind .* step-00000001"):
        latest_set(tmp_path)
    shutil.rmtree(old)
    with pytest.raises(CheckpointError, match="no other set is whole"):
        latest_set(tmp_path)


def test_ranks_verify_a_share_each_and_agree(tmp_path: Path) -> None:
    path = save(tmp_path, 1, make_layout(GPT, 2, 1, 2))
    assert {m.step for m in on_ranks(4, lambda control: verify_together(path, control))} == {1}
    (path / "shard-00002.h5").write_bytes(b"")
    results = on_ranks(4, lambda control: verify_together(path, control))
    assert len({str(r) for r in results}) == 1 and "shard-00002.h5 has 0 bytes" in str(results[0])
    verify_set(path, ["shard-00001.h5"])


@pytest.mark.parametrize("field", ["version", "format", "step", "kinds", "box", "file"])
def test_a_manifest_with_wrong_content_is_refused(tmp_path: Path, field: str) -> None:
    path = save(tmp_path, 1, make_layout(GPT))
    rest = (path / "manifest.json").read_bytes()[46:]
    swaps = {"version": (b'"version": 1', b'"version": 2'), "format": (b"hpcpar-checkpoint", b"other"),
             "step": (b'"step": 1,\n', b'"step": -1,\n'), "kinds": (b"float32", b"object"),
             "box": (b",[0],[16]]", b",[1],[16]]"), "file": (b"shard-00000.h5", b"../../x.h5")}
    assert rest.startswith(b'"') and rest.count(swaps[field][0]) > 0
    rest = rest.replace(*swaps[field])
    (path / "manifest.json").write_bytes(b'{"checksum": "' + xxhash.xxh3_128_hexdigest(rest).encode() + rest)
    with pytest.raises(CheckpointError, match="is not a manifest of"):
        read_manifest(path)


def test_works_where_the_files_are_locked(tmp_path: Path) -> None:
    layout = make_layout(GPT)
    path = save(tmp_path, 1, layout)
    holder = subprocess.Popen([sys.executable, "-c", f"""
import fcntl, glob, sys
held = [open(p, "r+b") for p in glob.glob("{path}/*.h5")]
for f in held: fcntl.flock(f, fcntl.LOCK_EX)
print("held", flush=True); sys.stdin.read()"""], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with (path / "model.h5").open("rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert_equal(load_shards(path, layout, 0, "float32"), shards_of(layout, 0))
        load_tensor(path, "final_norm.weight")
    finally:
        holder.communicate(b"")


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="h5dump is not installed")
def test_h5dump_reads_the_index(tmp_path: Path) -> None:
    path = save(tmp_path, 1, make_layout(GPT, 2, 1, 2))
    said = subprocess.run(["h5dump", "-y", "-d", "/final_norm/weight", path / "model.h5"], cwd="/", text=True,
                          capture_output=True, check=True).stdout
    value = f"{load_tensor(path, 'final_norm.weight')[0]:.5g}"
    assert value in said and "nan" not in said


def test_the_room_does_not_import_torch() -> None:
    code = "import sys, hpcpar.checkpoint; sys.exit('torch' in sys.modules or 'mpi4py' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


def test_a_failed_rank_fails_all_with_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, write = make_layout(GPT, 2, 1, 2), tasks_module.write_file
    good = save(tmp_path, 1, layout)

    def full(path: Path, *rest: object) -> object:
        if path.name in ("shard-00002.h5", "shard-00003.h5"):
            raise OSError(28, "No space left on device")
        return write(path, *rest)

    monkeypatch.setattr(tasks_module, "write_file", full)
    results = try_save(tmp_path, 2, layout)
    assert {str(r) for r in results} == {"cannot save step-00000002: rank 2 (and 1 more ranks): OSError: [Errno 28] No "
                                         "space left on device; older sets are untouched"}
    assert [p.name for p in tmp_path.iterdir()] == [good.name] and verify_set(good)
    monkeypatch.undo()
    monkeypatch.setattr(tasks_module, "write_index", lambda *a: (_ for _ in ()).throw(OSError(5, "I/O")))
    assert all("rank 0: OSError: [Errno 5]" in str(r) for r in try_save(tmp_path, 2, layout))
    monkeypatch.undo()
    monkeypatch.setattr(publish_module, "write_bytes", lambda *a: (_ for _ in ()).throw(OSError(28, "full")))
    assert all("rank 0: OSError: [Errno 28]" in str(r) for r in try_save(tmp_path, 2, layout))
    monkeypatch.undo()
    assert latest_set(tmp_path) == good and save(tmp_path, 2, layout) == latest_set(tmp_path)


FULL = """
import resource, signal, sys
from pathlib import Path
from hpcpar.checkpoint import latest_set, verify_set
from hpcpar.errors import CheckpointError
from tests.checkpoint.sets import GPT, make_layout, save
folder, layout = Path(sys.argv[1]), make_layout({**GPT, "hidden": 64, "vocab": 5000}, 2)
if sys.argv[2] == "limit":
    save(folder, 1, layout)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
else:
    save(folder, 1, make_layout(GPT, 2))
for _ in range(2):
    try:
        save(folder, 2, layout)
    except CheckpointError as error:
        print(error)
assert verify_set(latest_set(folder)).step == 1
assert [p.name for p in folder.iterdir() if p.name != "filler"] == ["step-00000001"]
"""


@pytest.mark.parametrize("limit", [1, 3000, 500_000])
def test_a_file_too_large(tmp_path: Path, limit: int) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path / "c", "limit", str(limit)], text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rank 0 (and 1 more ranks): OSError: [Errno ") == 2, done.stdout


def test_a_full_disk(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("may not mount a small tmpfs")
    try:
        done = subprocess.run([sys.executable, "-c", FULL, tmp_path, "disk"], text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("No space left on device; older sets are untouched") == 2
    finally:
        subprocess.run(["umount", tmp_path], check=True)
