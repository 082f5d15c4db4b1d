from pathlib import Path
from time import perf_counter

import h5py
import numpy as np
import pytest

from hpcpar.checkpoint import load_shards, load_tensor, published_sets, read_manifest, verify_set
from hpcpar.checkpoint.format import Manifest, StoredBox, index_path
from hpcpar.checkpoint.load import Wanted, plan_reads
from hpcpar.errors import CheckpointError
from hpcpar.layout.boxes import Box
from hpcpar.layout.layout import Layout
from tests.checkpoint.sets import (
    GPT,
    KINDS,
    LLAMA,
    UNTIED,
    assert_equal,
    make_layout,
    reference,
    save,
    shards_of,
)

CUTS = [(1, 1, 1, 0), (1, 1, 1, 1), (2, 1, 1, 1), (4, 1, 2, 1), (1, 2, 1, 1), (1, 3, 2, 0), (1, 1, 3, 1), (1, 1, 8, 1),
        (2, 2, 2, 1), (2, 2, 2, 0), (4, 2, 1, 1), (2, 3, 1, 1)]


@pytest.mark.parametrize(("model", "stride"), [(GPT, 1), (UNTIED, 4), (LLAMA, 1)], ids=["gpt", "untied", "llama"])
def test_all_ordered_pairs_of_twelve_layouts_are_bit_equal(model: dict, stride: int, tmp_path: Path) -> None:
    """Untied differs in one tensor: every fourth pair will do."""
    layouts = [make_layout(model, *cut) for cut in CUTS]
    expected = [[shards_of(layout, rank) for rank in range(layout.mesh.size)] for layout in layouts]
    for number, source in enumerate(layouts):
        found = verify_set(save(tmp_path, number, source, ranks_per_file=1 + number % source.mesh.size))
        assert set(found.tensors) == {p.name for p in source.table}
        path = tmp_path / f"step-{number:08d}"
        for target, shards in list(zip(layouts, expected, strict=True))[number % stride :: stride]:
            # every rank of the target, but not the copies of a rank that holds the same
            for rank in range(target.mesh.size):
                if target.num_shards > 1 or target.mesh.coordinates(rank).dp_rank == 0:
                    assert_equal(load_shards(path, target, rank, "float32", verify=False), shards[rank])


@pytest.mark.parametrize("model", [{**GPT, "layers": 5}, LLAMA], ids=["gpt", "llama"])
def test_schedules_and_chunks_leave_no_trace(model: dict, tmp_path: Path) -> None:
    """A set saved with chunks in a loop, in a V or with none loads into each of them."""
    wishes = [{}, {"schedule": "interleaved", "chunks": 2}, {"schedule": "zbv", "chunks": 2},
              {"schedule": "breadth-first", "chunks": 2, "zero": 0}, {"schedule": "zero-bubble"}]
    layouts = [make_layout(model, 2, 2, 2, **wish) for wish in wishes]
    assert len({layout.stages[0] for layout in layouts}) == 3  # a run of layers, every other run, or the two ends
    for number, source in enumerate(layouts):
        path = save(tmp_path, number, source)
        for target in layouts:
            for rank in range(8):
                assert_equal(load_shards(path, target, rank, "float32", verify=False), shards_of(target, rank))


def test_a_cast_is_the_stated_one(tmp_path: Path) -> None:
    layout = make_layout(GPT, 2)
    path = save(tmp_path, 1, layout, "float64")
    narrow = load_shards(path, layout, 1, np.float32)
    for kind, flats in shards_of(layout, 1, "float64").items():
        for number, flat in enumerate(flats):
            assert (narrow[kind][number] == flat.astype("float32")).all()
    assert_equal(load_shards(path, layout, 1, np.float64), shards_of(layout, 1, "float64"))


@pytest.mark.parametrize("ranks_per_file", [1, 3, 8])
def test_files_and_index(tmp_path: Path, ranks_per_file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = make_layout(LLAMA, 4, 2)
    path = save(tmp_path / "here", 7, layout, ranks_per_file=ranks_per_file)
    (tmp_path / "here").rename(tmp_path / "moved")
    path = tmp_path / "moved" / path.name
    monkeypatch.chdir("/")
    manifest = verify_set(path)
    assert sorted(f.name for f in path.iterdir()) == sorted([f.name for f in manifest.files] + ["manifest.json"])
    assert len(manifest.files) == 1 + -(-8 // ranks_per_file)
    with h5py.File(path / "model.h5") as index:
        for kind in KINDS:
            for name, shape in manifest.tensors.items():
                want = reference(kind, name, shape)
                assert (index[index_path(kind, name)][:] == want).all()
                assert (load_tensor(path, name, kind, verify=False) == want).all()
        assert "layers/4/attention/q/weight" in index and "optimizer/exp_avg/layers/4/mlp/up/weight" in index
    for file in manifest.files[:-1]:
        with h5py.File(path / file.name) as hdf5:
            for tensor, box in file.boxes:
                stored = hdf5["weight/" + tensor.replace(".", "/") + "/" + "_".join(map(str, box.offset))]
                assert tuple(stored.attrs["offset"]) == box.offset and stored.shape == box.size


@pytest.mark.parametrize(("target", "limit"), [((2, 2, 2), 1.1), ((1, 4, 2), 2.0), ((4, 1, 1), 2.0)])
def test_a_rank_reads_little_more_than_its_own(tmp_path: Path, target: tuple, limit: float) -> None:
    model = {**GPT, "layers": 4, "hidden": 256, "vocab": 1003}
    path = save(tmp_path, 1, make_layout(model, 2, 2, 2))
    layout = make_layout(model, *target)
    own = sum(p.box.numel for p in layout.held_pieces(0)) * 4 * len(KINDS)

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    load_shards(path, layout, 0, "float32", verify=False)
    assert bytes_read() - before <= limit * own + 300_000  # the manifest, HDF5's metadata, this very count


def altered(manifest: Manifest, path: Path, **changes: object) -> None:
    values = {name: getattr(manifest, name) for name in ("step", "kinds", "tensors", "files", "state")}
    (path / "manifest.json").write_bytes(Manifest(**{**values, **changes}).to_bytes())


def test_strict_load_names_the_tensor(tmp_path: Path) -> None:
    layout = make_layout(GPT, 2)
    path = save(tmp_path, 1, layout)
    for other, words in (({**GPT, "layers": 4}, "layers.3.*missing"), ({**GPT, "layers": 2}, "layers.2.*not in the"),
                         ({**GPT, "vocab": 54}, r"embedding.token.weight is \[53, 16\], the model wants \[54, 16\]")):
        with pytest.raises(CheckpointError, match=words):
            load_shards(path, make_layout(other, 2), 0, "float32")
    with pytest.raises(CheckpointError, match=r"no layers.0.mlp.up.weigh; did you mean layers.0.mlp.up.weight"):
        load_tensor(path, "layers.0.mlp.up.weigh")
    manifest = read_manifest(path)
    first = manifest.files[0]
    short = type(first)(first.name, first.size, first.checksum, first.ranks,
                        tuple(b for b in first.boxes if b.tensor != "layers.1.mlp.up.weight"))
    altered(manifest, path, files=(short, *manifest.files[1:]))
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up.weight.*never written"):
        load_shards(path, make_layout(GPT), 0, "float32")


def test_an_overlap_that_hides_a_gap_is_found(tmp_path: Path) -> None:
    layout = make_layout(GPT)
    manifest = read_manifest(save(tmp_path, 1, layout))
    first = manifest.files[0]
    boxes = (StoredBox("final_norm.weight", Box((0,), (8,))), StoredBox("final_norm.weight", Box((4,), (8,))))
    torn = Manifest(1, manifest.kinds, manifest.tensors, (type(first)(first.name, 1, first.checksum, (0,), boxes),), {})
    with pytest.raises(CheckpointError, match=r"final_norm.weight.*overlap"):
        plan_reads(torn, [Wanted("final_norm.weight", Box((0,), (16,)), {})])


def test_planning_for_yuan_245b_is_quick() -> None:
    model = {"kind": "gpt", "layers": 76, "hidden": 16384, "heads": 128, "seq": 2048, "vocab": 53228, "tied": True}
    layout: Layout = make_layout(model, 8, 38, 7)
    start = perf_counter()
    assert layout.stored_pieces(1777)
    assert perf_counter() - start < 1
    assert published_sets(Path("/nowhere")) == []
