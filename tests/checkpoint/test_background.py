"""Saves beside the caller's work: the same sets, no rank left waiting, and no writer that outlives its rank."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpcpar.checkpoint import latest_set, published_sets, read_state, verify_set
from hpcpar.checkpoint.background import BackgroundSaver
from hpcpar.checkpoint.format import INDEX
from hpcpar.checkpoint.save import Published
from hpcpar.checkpoint.store import Dataset, declare, header_in_memory, open_hdf5
from hpcpar.checkpoint.tasks import Saving
from hpcpar.comm.control import Alone, Control
from hpcpar.errors import CheckpointError
from tests.checkpoint.processes import await_no_writer, writers
from tests.checkpoint.sets import GPT, KINDS, make_layout, on_ranks, save, shards_of

FLOATS = dict.fromkeys(KINDS, "float32")


def fill(saver: BackgroundSaver, shards: dict[str, list[Any]]) -> None:
    for kind, flats in shards.items():
        for copy, flat in zip(saver.shards[kind], flats, strict=True):
            copy[:] = flat


def step_until_done(saver: BackgroundSaver, control: Control) -> Published | None:
    """Play the training loop: go on until no rank is busy, then take the save further."""
    found = None
    while saver.active:
        if control.largest(int(saver.busy)):
            time.sleep(0.001)
        else:
            found = saver.advance() or found
    return found


def assert_same_set(one: Path, other: Path) -> None:
    """The values of the shard files to the last byte; libhdf5 leaves some bytes of its own to chance."""
    manifests = [replace(verify_set(path), files=()) for path in (one, other)]
    files = [[replace(file, checksum="") for file in verify_set(path).files if file.name != INDEX]
             for path in (one, other)]
    assert manifests[0] == manifests[1] and files[0] == files[1] and len(files[0]) > 0
    for file in files[0]:
        assert file.start is not None
        mine, theirs = ((folder / file.name).read_bytes()[file.start:] for folder in (one, other))
        assert mine == theirs and len(mine) > 0
    with open_hdf5(one / INDEX) as mine, open_hdf5(other / INDEX) as theirs:
        names: list[str] = []
        theirs.visititems(lambda name, item: names.append(name) if hasattr(item, "shape") else None)
        assert len(names) == len(KINDS) * len(manifests[0].tensors)
        for name in names:
            assert (mine[name][...] == theirs[name][...]).all(), name


@pytest.mark.parametrize(("cut", "ranks_per_file"), [((2, 1, 2), 2), ((1, 1, 3), 1)])
def test_the_set_is_the_one_that_a_synchronous_save_writes(tmp_path: Path, cut: tuple[int, ...],
                                                                ranks_per_file: int) -> None:
    layout = make_layout(GPT, *cut)
    expected = save(tmp_path / "now", 7, layout, ranks_per_file=ranks_per_file)

    def work(control: Control) -> Published | None:
        saver = BackgroundSaver(Saving(tmp_path / "beside", layout, ranks_per_file), control, FLOATS)
        for step in (6, 7):
            fill(saver, shards_of(layout, control.rank))
            saver.start(step, {"step": step})
            published = step_until_done(saver, control) if step == 7 else saver.finish()
        saver.close()
        return published

    results = on_ranks(layout.mesh.size, work)
    for published in results:
        assert isinstance(published, Published), published
        assert published.path == tmp_path / "beside" / "step-00000007"
    assert_same_set(results[0].path, expected)
    assert [path.name for path in published_sets(tmp_path / "beside")] == ["step-00000006", "step-00000007"]
    await_no_writer(tmp_path / "beside")


def limit_files(pid: int, num_bytes: int) -> None:
    """Let a process write no further than this into any file: what it gets is an OSError, as on a full disk."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def test_a_full_disk_on_one_rank_fails_on_all_and_the_next_save_succeeds(tmp_path: Path) -> None:
    layout = make_layout(GPT, 1, 1, 3)

    def work(control: Control) -> list[str]:
        saver, seen = BackgroundSaver(Saving(tmp_path, layout), control, FLOATS), []
        fill(saver, shards_of(layout, control.rank))
        for step in (1, 2, 3):
            if control.rank == 1:
                limit_files(writers(tmp_path)["rank-00001"], 4096 if step == 2 else resource.RLIM_INFINITY)
            try:
                saver.start(step, {})
                seen.append(saver.finish().path.name)
            except CheckpointError as error:
                seen.append(str(error))
                control.barrier()  # finish has waited for rank 0's writer to clear up
                assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
                control.barrier()
        saver.close()
        return seen

    for seen in on_ranks(3, work):
        assert isinstance(seen, list), seen
        assert seen[0::2] == ["step-00000001", "step-00000003"]
        assert seen[1].startswith("cannot save step-00000002: rank 1: OSError: [Errno 27] File too large")
    assert [verify_set(path).step for path in published_sets(tmp_path)] == [1, 3]


def test_a_write_that_fails_beneath_hdf5_is_told_as_what_it_was() -> None:
    datasets = [Dataset(f"a/{number}", (16,), "<f4", (0,)) for number in range(50)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for most in range(0, 6000, 60):
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
            with pytest.raises(OSError, match="File too large"):
                header_in_memory(lambda file: declare(file, datasets))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any("hpcpar-hdf5" in os.path.realpath(open_file) for open_file in Path("/proc/self/fd").iterdir())


def test_a_state_that_is_no_json_fails_on_all_ranks(tmp_path: Path) -> None:
    layout = make_layout(GPT, 1, 1, 2)

    def work(control: Control) -> None:
        saver = BackgroundSaver(Saving(tmp_path, layout), control, FLOATS)
        with pytest.raises(CheckpointError, match="rank 0: ValueError"):
            saver.start(1, {"loss": float("nan")})
            saver.finish()
        saver.close()

    assert on_ranks(2, work) == [None, None]
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_dies_is_replaced(tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    layout = make_layout(GPT)
    saver = BackgroundSaver(Saving(tmp_path, layout), Alone(), FLOATS)
    fill(saver, shards_of(layout, 0))
    first = writers(tmp_path)["rank-00000"]
    os.kill(first, signal.SIGKILL)
    saver.start(1, {})
    assert saver.finish().path == latest_set(tmp_path)
    second = writers(tmp_path)["rank-00000"]
    assert second != first and "writer of rank 0 has died (SIGKILL)" in capfd.readouterr().err
    os.kill(second, signal.SIGKILL)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "false")  # what is started instead dies at once
        saver.start(2, {})
        with pytest.raises(CheckpointError, match=r"rank 0: its writer died twice \(exit code 1\)"):
            saver.finish()
        patch.setattr(sys, "executable", "/no/such/program")
        saver.start(2, {})
        with pytest.raises(CheckpointError, match="its writer cannot be started"):
            saver.finish()
    assert latest_set(tmp_path).name == "step-00000001"
    saver.start(3, {})
    assert verify_set(saver.finish().path).step == 3
    saver.close()


SAVER = """
import sys
from pathlib import Path
from hpcpar.checkpoint.background import BackgroundSaver
from hpcpar.checkpoint.tasks import Saving
from hpcpar.comm.control import Alone
from tests.checkpoint.sets import GPT, make_layout, shards_of
from tests.checkpoint.test_background import FLOATS, fill, step_until_done
layout, same = make_layout({**GPT, "hidden": 64}), sys.argv[3] == "same"
saver, step = BackgroundSaver(Saving(Path(sys.argv[1]), layout, 1, 3), Alone(), FLOATS), int(sys.argv[2])
fill(saver, shards_of(layout, 0))
while True:
    step += 1
    saver.start(5 if same else step, {"save": step})
    step_until_done(saver, Alone())
    print(step, flush=True)
"""


@pytest.mark.parametrize("mode", ["next", "same"])
def test_a_killed_rank_takes_its_writer_along_and_leaves_the_last_published_set(tmp_path: Path, mode: str) -> None:
    dice, last, torn = random.Random(mode), 0, 0
    for _ in range(6):
        rank = subprocess.Popen([sys.executable, "-c", SAVER, tmp_path, str(last), mode], stdout=subprocess.PIPE,
                                text=True)
        rank.stdout.readline()
        time.sleep(dice.random() * 0.1)
        rank.kill()
        said = rank.communicate()[0].split()
        told = int(said[-1]) if said else last + 1
        await_no_writer(tmp_path)
        torn += any(path.name.endswith(".tmp") for path in tmp_path.iterdir())
        found = latest_set(tmp_path)
        assert found is not None and len(published_sets(tmp_path)) <= 4
        verify_set(found)
        last = read_state(found)["save"]
        assert last in (told, told + 1)
    assert torn  # at least one was killed in the midst of a write
    save(tmp_path, last + 1, make_layout({**GPT, "hidden": 64}), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{last + 1:08d}"]


def test_signals_to_a_whole_job_do_not_end_a_writer(tmp_path: Path) -> None:
    layout = make_layout(GPT)
    saver = BackgroundSaver(Saving(tmp_path, layout), Alone(), FLOATS)
    pid = writers(tmp_path)["rank-00000"]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(pid, number)
    saver.start(1, {})
    assert saver.finish() and writers(tmp_path)["rank-00000"] == pid
    saver.close()
    await_no_writer(tmp_path)

