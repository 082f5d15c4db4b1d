"""Copies in the nodes' memory: threads with a host name each play hosts; a node is lost with its folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from hpcpar.checkpoint import load_together, memory, verify_set
from hpcpar.checkpoint.background import BackgroundSaver
from hpcpar.checkpoint.format import read_manifest
from hpcpar.checkpoint.memory import Memory, check_room, disown, forget, open_memory, recall, remember
from hpcpar.checkpoint.tasks import InProcess, Saving, Tasks
from hpcpar.checkpoint.verify import rewind
from hpcpar.comm.control import Alone, Control
from hpcpar.errors import CheckpointError, UserError
from hpcpar.layout.layout import Layout
from tests.checkpoint.sets import GPT, KINDS, assert_equal, make_layout, on_ranks, save, shards_of

FLOATS = dict.fromkeys(KINDS, "float32")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    (tmp_path / "shm").mkdir()
    return tmp_path / "shm"


def multiples(layout: Layout, rank: int, step: int) -> dict[str, list[Any]]:
    return {kind: [flat * flat.dtype.type(step) for flat in flats] for kind, flats in shards_of(layout, rank).items()}


def keep(checkpoints: Path, shared: Path, layout: Layout, per_host: int, *steps: int, end: bool = False) -> Path:
    """Keep the sets of steps in memory, and only there; return the run's place."""
    def work(control: Control) -> Path:
        place = open_memory(checkpoints, control, f"node{control.rank // per_host}", shared)
        check_room(place, control, 1000)
        for step in steps:
            tasks = Tasks(Saving(checkpoints, layout), control.rank, multiples(layout, control.rank, step))
            assert list(remember(place, step, {"step": step}, control, InProcess(tasks))) == [None, None]
        if end:
            control.barrier()
            forget(place)
        return place.folder
    return on_ranks(layout.mesh.size, work)[0]


def bring_back(checkpoints: Path, shared: Path, layout: Layout, per_host: int, oldest: int = 0) -> list[Any]:
    """Return by rank the set found in memory, what was told, and the shards read from there."""
    def work(control: Control) -> tuple[Path | None, list[str], Any]:
        said: list[str] = []
        place = open_memory(checkpoints, control, f"node{control.rank // per_host}", shared)
        found = recall(place, layout, control, oldest, said.append)
        return found, said, load_together(found, layout, control, "float32") if found else None
    return on_ranks(layout.mesh.size, work)


@pytest.mark.parametrize("lost", [None, "node0", "node1", "node2"])
@pytest.mark.parametrize("after", [(2, 1, 3), (1, 3, 2)])
def test_any_one_node_may_be_lost(tmp_path: Path, shared: Path, lost: str | None, after: tuple[int, ...]) -> None:
    layout, target = make_layout(GPT, 2, 1, 3), make_layout(GPT, *after)
    folder = keep(tmp_path / "sets", shared, layout, 2, 3, 4)
    assert sorted(path.name for path in folder.glob("*/*")) == ["step-00000004"] * 3
    if lost:
        shutil.rmtree(folder / lost)
    for rank, (found, said, shards) in enumerate(bring_back(tmp_path / "sets", shared, target, 2)):
        assert found == folder / f"node{rank // 2}" / "step-00000004" and said == []
        assert read_manifest(found).state == {"step": 4}
        assert_equal(shards, multiples(target, rank, 4))


def test_neighbours_lost_together_are_told_of(tmp_path: Path, shared: Path) -> None:
    layout = make_layout(GPT, 1, 1, 4)
    folder = keep(tmp_path / "sets", shared, layout, 1, 1)
    shutil.rmtree(folder / "node1")
    shutil.rmtree(folder / "node2")
    for found, said, _ in bring_back(tmp_path / "sets", shared, layout, 1):
        assert found is None
        assert said == ["the copy in memory of step-00000001 cannot be used: 1 of its 4 files are on no host that is "
                        "left, shard-00001.h5 first"]


def test_a_copy_that_was_spoilt_is_refused_by_its_checksum(tmp_path: Path, shared: Path) -> None:
    layout = make_layout(GPT, 1, 1, 2)
    folder = keep(tmp_path / "sets", shared, layout, 1, 1)
    shutil.rmtree(folder / "node0")
    file = folder / "node1" / "step-00000001" / "shard-00000.h5"
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 4
    file.write_bytes(raw)
    for found, said, _ in bring_back(tmp_path / "sets", shared, layout, 1):
        assert found is None and "shard-00000.h5 holds other bytes than were written (checksum)" in said[0]


def test_what_is_older_than_the_disk_does_not_count(tmp_path: Path, shared: Path) -> None:
    layout = make_layout(GPT)
    keep(tmp_path / "sets", shared, layout, 1, 5)
    assert bring_back(tmp_path / "sets", shared, layout, 1, oldest=6)[0][0] is None
    assert bring_back(tmp_path / "sets", shared, layout, 1, oldest=5)[0][0] is not None


def test_a_rewound_run_does_not_find_what_came_after(tmp_path: Path, shared: Path) -> None:
    layout = make_layout(GPT)
    save(tmp_path / "sets", 1, layout)
    keep(tmp_path / "sets", shared, layout, 1, 1, 2)
    rewind(tmp_path / "sets", tmp_path / "sets" / "step-00000001")
    assert bring_back(tmp_path / "sets", shared, layout, 1)[0][0] is None
    assert [path.name for path in shared.glob("*/*/*")] == []  # deleted when the run was opened anew


def test_a_start_without_copies_deletes_them_for_good(tmp_path: Path, shared: Path) -> None:
    layout = make_layout(GPT)
    keep(tmp_path / "sets", shared, layout, 1, 1)
    disown(tmp_path / "sets", shared)
    assert list(shared.iterdir()) == [] and bring_back(tmp_path / "sets", shared, layout, 1)[0][0] is None


def test_a_copy_that_was_not_finished_does_not_count_and_goes(tmp_path: Path, shared: Path) -> None:
    layout = make_layout(GPT, 1, 1, 2)
    home = keep(tmp_path / "sets", shared, layout, 1, 3) / "node1"
    shutil.copytree(home / "step-00000003", home / ".step-00000009.tmp")
    assert [found and found.name for found, *_ in bring_back(tmp_path / "sets", shared, layout, 1)] == [
        "step-00000003"] * 2
    assert [path.name for path in home.iterdir()] == ["step-00000003"]


def test_a_clean_end_leaves_nothing_in_memory(tmp_path: Path, shared: Path) -> None:
    keep(tmp_path / "sets", shared, make_layout(GPT, 1, 1, 2), 1, 1, end=True)
    assert list(shared.iterdir()) == []


def test_without_memory_the_disk_has_to_do(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = make_layout(GPT, 1, 1, 2)
    keep(tmp_path / "sets", shared, layout, 1, 1)
    monkeypatch.setattr(memory.os, "posix_fallocate", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))

    def work(control: Control) -> list[str]:
        said: list[str] = []
        place = open_memory(tmp_path / "sets", control, f"node{control.rank}", shared)
        saver = BackgroundSaver(Saving(tmp_path / "sets", layout), control, FLOATS, place, said.append)
        saver.start(2, {})
        saver.finish()
        saver.close()
        return said

    for said in on_ranks(2, work):
        assert said == ["cannot save step-00000002 in memory: rank 0 (and 1 more ranks): OSError: [Errno 28] No space "
                        "left; older sets are untouched; the disk has to do"]
    assert verify_set(tmp_path / "sets" / "step-00000002").step == 2
    assert {path.name for path in shared.glob("*/*/*")} == {"step-00000001"}  # what was there stays
    assert bring_back(tmp_path / "sets", shared, layout, 1, oldest=2)[0][0] is None


def test_too_little_memory_is_refused_before_the_first_step(tmp_path: Path) -> None:
    place = Memory(tmp_path, ("here",), 0)
    with pytest.raises(UserError, match=r"checkpoint.asynchronous: neighbour needs memory in .* here needs .* has"):
        check_room(place, Alone(), 1 << 60)


def test_who_keeps_whose() -> None:
    place = Memory(Path(), ("a", "a", "b", "b", "c"), 0)
    assert [place.neighbour(rank) for rank in range(5)] == [2, 3, 4, 4, 0]
    assert Memory(Path(), ("a", "a"), 0).neighbour(1) is None


def test_a_save_that_fails_in_memory_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="copies in memory: rank 0"):
        open_memory(tmp_path / "sets", Alone(), "here", tmp_path / "none")
