"""Whole runs on 8 ranks: stop and resume at other layouts, stop requests, non-finite steps."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest

from hpcpar.checkpoint.verify import latest_set, published_sets, verify_set
from hpcpar.config.resolve import resolve
from hpcpar.config.run_folder import RunFolder, read_lines
from hpcpar.errors import RunError, UserError
from hpcpar.parallel.reduction import Reduction
from hpcpar.parallel.zero import ShardedOptimizer
from hpcpar.train.loop import start_run, train
from hpcpar.train.preflight import open_order
from hpcpar.train.state import FIRST_LOSS_SCALE
from tests.train.small import make_job, make_store

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def store(world):
    folder = world.control.broadcast(tempfile.mkdtemp() if world.rank == 0 else None)
    if world.rank == 0:
        make_store(Path(folder))
    world.control.barrier()
    return Path(folder) / "store"


@pytest.fixture
def folder(world):
    path = RunFolder(Path(world.control.broadcast(tempfile.mkdtemp() if world.rank == 0 else None)))
    path.create()
    world.control.barrier()
    return path


def run_once(world, job, folder):
    """Play `hpcpar train` inside this world; return whether the job is done, and the run."""
    job = resolve(job, world.size)
    run = start_run(job, world, folder, open_order(job), False, lambda action: None)
    run.waits = lambda: dict(world.control.recorder.waits)
    try:
        return train(run, lambda **where: None), run
    finally:
        run.trainee.groups.close()


def figures(folder, key):
    return {line["step"]: line[key] for line in read_lines(folder.metrics) if key in line}


def test_stop_and_resume_at_other_layouts_equals_an_uninterrupted_run(world, store, folder, apart):
    whole = RunFolder(folder.path / "whole")
    whole.create()
    world.control.barrier()
    assert run_once(world, make_job(store, layout={"tp": 2, "pp": 2}), whole)[0]
    pieces = [({"tp": 2, "pp": 2}, 1), ({"tp": 1, "pp": 2, "zero": 0, "schedule": "zbv", "chunks": 2}, 2),
              ({"tp": 2, "pp": 2, "zero": 3}, 4), ({"tp": 4, "zero": 2, "schedule": "gpipe"}, 6)]
    for layout, steps in pieces:
        assert run_once(world, make_job(store, layout=layout, train={"steps": steps}), folder)[0]
    if world.rank == 0:
        assert [set(waits) for waits in figures(whole, "mean_waits_s").values()] == [{"tp", "pp", "dp", "all", "text"}]
        assert figures(folder, "samples_hash") == figures(whole, "samples_hash")
        for key in ("loss", "grad_norm", "val_loss"):
            got, want = figures(folder, key), figures(whole, key)
            assert len(want) >= 2
            for step in want:
                assert got[step] == pytest.approx(want[step], rel=1e-10, abs=1e-10), (key, step)


def test_bit_equal_resume_at_the_same_layout(world, store, folder):
    whole = RunFolder(folder.path / "whole")
    whole.create()
    world.control.barrier()
    layout = {"tp": 2, "pp": 2}
    run_once(world, make_job(store, layout=layout), whole)
    for steps in (3, 6):
        run_once(world, make_job(store, layout=layout, train={"steps": steps}), folder)
    if world.rank == 0:
        assert figures(folder, "loss") == figures(whole, "loss")


def test_a_stop_file_saves_and_stops(world, store, folder, monkeypatch):
    original = ShardedOptimizer.begin

    def begin(self, num_microbatches):
        if world.rank == 0:  # who has looked for the file already, in this step
            folder.stop.touch()
        original(self, num_microbatches)

    with monkeypatch.context() as patch:
        patch.setattr(ShardedOptimizer, "begin", begin)
        done, run = run_once(world, make_job(store, layout={"pp": 2}), folder)
    assert not done and run.progress.step == 2
    assert latest_set(folder.checkpoints).name == "step-00000002"
    assert folder.stop.exists()  # so that nothing requeues the run; the next start takes it away
    assert run_once(world, make_job(store, layout={"pp": 2}), folder)[0]
    assert not folder.stop.exists()


def test_a_signal_to_one_rank_stops_all_at_the_same_step(world, store, folder, monkeypatch):
    original = ShardedOptimizer.begin

    def begin(self, num_microbatches):
        if world.rank == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        original(self, num_microbatches)

    monkeypatch.setattr(ShardedOptimizer, "begin", begin)
    done, run = run_once(world, make_job(store, layout={"tp": 2}), folder)
    steps = world.control.all_gather(run.progress.step)
    assert not done and len(set(steps)) == 1 and steps[0] <= 2
    assert latest_set(folder.checkpoints) is not None


def poison(monkeypatch, world, rank, steps):
    """Put a NaN into one rank's gradients at some steps."""
    begin, reduce, taken = ShardedOptimizer.begin, Reduction.start, [0]

    def counted(self, num_microbatches):
        taken[0] += 1
        begin(self, num_microbatches)

    def poisoned(self, gradient):
        if world.rank == rank and taken[0] in steps:
            gradient.whole[0] = float("nan")
        reduce(self, gradient)

    monkeypatch.setattr(ShardedOptimizer, "begin", counted)
    monkeypatch.setattr(Reduction, "start", poisoned)


@pytest.mark.parametrize("precision", ["fp64", "fp16"])
def test_a_nan_on_one_rank_skips_the_step_everywhere(world, store, folder, monkeypatch, precision):
    poison(monkeypatch, world, 3, (2,))
    before = []
    original = ShardedOptimizer.update
    monkeypatch.setattr(ShardedOptimizer, "update", lambda self, *a: (before.append(a[1]), original(self, *a))[1])
    job = make_job(store, layout={"tp": 2, "pp": 2}, train={"precision": precision})
    done, run = run_once(world, job, folder)
    assert done and before == [0, 1, 2, 3, 4] and run.progress.updates == 5 and run.progress.step == 6
    assert run.progress.loss_scale == (FIRST_LOSS_SCALE / 2 if precision == "fp16" else 1.0)
    everyones = world.control.all_gather(run.progress.as_dict())
    assert all(progress == everyones[0] for progress in everyones)
    for shards in run.trainee.optimizer.shards().values():
        assert all(bool(shard.isfinite().all()) for shard in shards)
    if world.rank == 0:
        assert [step for step, skipped in figures(folder, "skipped").items() if skipped] == [2]


def test_endless_nans_end_the_run_alike(world, store, folder, monkeypatch):
    poison(monkeypatch, world, 3, range(100))
    monkeypatch.setattr("hpcpar.train.loop.MAX_BAD_STEPS", 2)
    job = make_job(store, layout={"tp": 2, "pp": 2})
    with pytest.raises(RunError, match="not finite: 3 bad steps in a row"):
        run_once(world, job, folder)
    assert latest_set(folder.checkpoints) is None


def test_another_model_seed_or_text_is_refused_at_resume(world, store, folder):
    run_once(world, make_job(store, train={"steps": 1}), folder)
    for tables, field in (({"model": {"hidden": 64}}, "model.hidden"), ({"train": {"seed": 2}}, "train.seed"),
                          ({"data": {"validation": 0.2}}, "data.validation")):
        with pytest.raises(UserError, match=field):
            run_once(world, make_job(store, **tables), folder)


def test_batch_ramp_takes_the_same_samples_on_any_layout(world, store, folder):
    job = {"optim": {"ramp": [8, 8, 24], "decay_steps": 4}, "train": {"global_batch": 16, "steps": 4}}
    seen = []
    for number, layout in enumerate(({"tp": 2, "pp": 2}, {}, {"tp": 4})):
        one = RunFolder(folder.path / str(number))
        one.create()
        world.control.barrier()
        run_once(world, make_job(store, layout=layout, **job), one)
        seen.append(figures(one, "samples_hash") if world.rank == 0 else {})
        tokens = figures(one, "tokens")
        if world.rank == 0:
            assert list(np.diff([0, *tokens.values()])) == [8 * 16, 8 * 16, 8 * 16, 16 * 16]
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 2, "zero": 3}, {"pp": 2, "zero": 0}])
def test_asynchronous_sets_are_those_of_synchronous_saves(world, store, folder, layout):
    found = []
    for asynchronous in (True, False):
        one = RunFolder(folder.path / str(asynchronous))
        one.create()
        world.control.barrier()
        job = make_job(store, layout=layout, checkpoint={"every": 2, "asynchronous": asynchronous, "ranks_per_file": 3})
        done, run = run_once(world, job, one)
        assert done and run.saves.saved_step == 6
        assert figures(one, "save_bytes").keys() == {2, 4, 6}
        found.append([[(file.boxes, (path / file.name).read_bytes()[file.start:])
                       for file in verify_set(path).files if file.boxes] for path in published_sets(one.checkpoints)])
        world.control.barrier()
    assert len(found[0]) == 3 and found[0] == found[1]  # libhdf5 leaves some bytes of its own to chance


def test_all_ranks_agree_on_an_automatic_interval(world, store, folder):
    job = make_job(store, train={"steps": 25}, checkpoint={"every": "auto", "keep": 0}, machine={"mtbf_h": 0.001},
                   data={"validate_every": 0})
    done, run = run_once(world, job, folder)
    rhythms = world.control.all_gather((run.saves.saved_step, run.saves._rhythm.next_step))
    assert done and len(set(rhythms)) == 1
    assert verify_set(published_sets(folder.checkpoints)[0]).step == 10
    world.control.barrier()
