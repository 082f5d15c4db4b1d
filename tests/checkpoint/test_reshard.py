import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import h5py
import numpy as np
import pytest

from hpcpar.checkpoint import (
    load_shards,
    load_tensor,
    published_sets,
    read_manifest,
    read_state,
    save_set,
    verify_set,
)
from hpcpar.checkpoint.format import Manifest, StoredBox, index_path
from hpcpar.checkpoint.load import Wanted, plan_reads
from hpcpar.comm.control import Alone
from hpcpar.config.job import Job
from hpcpar.config.ramp import batch_size
from hpcpar.config.resolve import resolve
from hpcpar.errors import CheckpointError
from hpcpar.layout.boxes import Box
from hpcpar.layout.layout import Layout
from hpcpar.optim.schedules import learning_rate
from hpcpar.train.preflight import open_order
from hpcpar.train.resume import check_same, saved_progress
from hpcpar.train.state import Progress
from tests.checkpoint.sets import (
    GPT,
    KINDS,
    LLAMA,
    UNTIED,
    assert_equal,
    make_layout,
    on_ranks,
    reference,
    save,
    shards_of,
)
from tests.train.small import make_job, make_store

# tp, pp, dp, zero stage, precision: fp64 jobs keep fp64 master weights, all others fp32; vocabulary rows, layers and
# ZeRO ranges divide unevenly; one is hybrid
CUTS = [(1, 1, 1, 0, "fp32"), (1, 1, 1, 1, "fp64"), (2, 1, 1, 1, "bf16"), (2, 1, 4, (3, 2), "fp16"),
        (1, 2, 1, 1, "fp64"), (1, 3, 2, 0, "bf16"), (1, 1, 3, 2, "fp32"), (1, 1, 8, 3, "fp64"), (2, 2, 2, 1, "fp16"),
        (2, 2, 2, 2, "fp64"), (4, 2, 1, 1, "fp32"), (2, 3, 1, 1, "bf16")]


def main_dtype(precision: str) -> str:
    return "float64" if precision == "fp64" else "float32"


@pytest.mark.parametrize(("model", "stride"), [(GPT, 1), (UNTIED, 6), (LLAMA, 3)], ids=["gpt", "untied", "llama"])
def test_all_ordered_pairs_of_twelve_layouts_are_bit_equal(model: dict, stride: int, tmp_path: Path) -> None:
    """After the one stated cast, from the saved dtype to the job's; all 144 pairs for gpt, some for its relatives."""
    layouts = [make_layout(model, *cut[:4]) for cut in CUTS]
    dtypes = [main_dtype(cut[4]) for cut in CUTS]
    expected = {dtype: [[shards_of(layout, rank, dtype) for rank in range(layout.mesh.size)] for layout in layouts]
                for dtype in ("float32", "float64")}
    for number, source in enumerate(layouts):
        path = save(tmp_path, number, source, dtypes[number], ranks_per_file=1 + number % source.mesh.size)
        assert set(verify_set(path).tensors) == {p.name for p in source.table}
        for other in range(number % stride, len(CUTS), stride):
            target = layouts[other]
            # every rank of the target, but not the copies of a rank that holds the same
            for rank in range(target.mesh.size):
                if target.num_shards > 1 or target.mesh.coordinates(rank).dp_rank == 0:
                    saved = expected[dtypes[number]][other][rank]
                    cast = {kind: [flat.astype(dtypes[other]) for flat in flats] for kind, flats in saved.items()}
                    assert_equal(load_shards(path, target, rank, dtypes[other], verify=False), cast)
        shutil.rmtree(path)


def test_state_means_the_same_on_all_twelve_layouts(tmp_path: Path) -> None:
    """Data position, order of samples, schedules, loss scale; random numbers are functions of seed, step, element."""
    store = make_store(tmp_path)
    progress = Progress(step=37, samples=37 * 24, updates=36, skips=1, loss_scale=2.0**13, finite_steps=4)

    def job_of(cut: tuple) -> Job:
        tp, pp, dp, zero, precision = cut
        return resolve(make_job(store, train={"global_batch": 48, "precision": precision, "steps": 90, "seed": 5},
                                layout={"tp": tp, "pp": pp, "dp": dp, "zero": zero},
                                optim={"ramp": [24, 24, 2000], "decay_steps": 80, "warmup_steps": 5}))

    def meaning(job: Job, found: Progress) -> tuple:
        order = open_order(job)
        batch = batch_size(job, found.samples)
        return (learning_rate(job.optim, found.step), batch, order.fingerprint,
                order.samples_hash(np.arange(found.samples, found.samples + batch)))

    jobs = [job_of(cut) for cut in CUTS]
    for number, job in enumerate(jobs):
        state = {"progress": progress.as_dict(), "job": dataclasses.asdict(job), "data": open_order(job).fingerprint}
        path = save_set(tmp_path / "sets", number, make_layout(GPT), 0, Alone(), shards_of(make_layout(GPT), 0), state)
        read = read_state(tmp_path / "sets" / f"step-{number:08d}")
        for other in jobs:
            check_same(read, other, open_order(other), path)
            found = saved_progress(read, other, Progress(loss_scale=1.0))
            same = job.train.precision == other.train.precision
            assert found == (progress if same else dataclasses.replace(progress, loss_scale=1.0, finite_steps=0))
            assert meaning(other, found) == meaning(job, progress)


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


MEMORY = """
import resource, sys
from pathlib import Path
from hpcpar.checkpoint import load_shards, read_manifest
from tests.checkpoint.sets import make_layout
from tests.checkpoint.test_reshard import LARGE
path, layout = Path(sys.argv[1]), make_layout(LARGE, *map(int, sys.argv[2:5]))
read_manifest(path)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read = int(Path("/proc/self/io").read_text().split()[1])
shards = load_shards(path, layout, 1, "float32", verify=sys.argv[5] == "verify")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, sum(f.nbytes for k in shards.values() for f in k),
      int(Path("/proc/self/io").read_text().split()[1]) - read)
"""
LARGE = {**GPT, "layers": 6, "hidden": 640, "heads": 8, "seq": 64, "vocab": 2003}
MIB = 2**20


def test_memory_and_bytes_of_a_set_of_hundreds_of_mib(tmp_path: Path) -> None:
    layout = make_layout(LARGE, 2, 1, 2)
    shards = {rank: {kind: [np.full(b.numel // 2, rank + 1, "float32") for b in layout.buckets(0, rank % 2)]
                     for kind in KINDS} for rank in range(4)}
    results = on_ranks(4, lambda c: save_set(tmp_path, 1, layout, c.rank, c, shards.pop(c.rank), {}))
    path = tmp_path / "step-00000001"
    size = sum(file.size for file in verify_set(path).files)
    assert size > 300 * MIB, results
    for cut, verify, limit in (((2, 1, 2), "no", 1.1), ((1, 1, 4), "no", 2.0), ((1, 2, 2), "no", 2.0),
                               ((1, 1, 4), "verify", None)):
        done = subprocess.run([sys.executable, "-c", MEMORY, path, *map(str, cut), verify], text=True,
                              capture_output=True, check=True)
        grown_kib, own, read = map(int, done.stdout.split())
        assert own < size / 3
        assert grown_kib * 1024 <= own + 64 * MIB  # far beneath the GiB allowed, which this set would hide in
        assert limit is None or read <= limit * own + MIB


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
