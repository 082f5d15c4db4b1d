"""A bad batch, an overflow, a drifting replica and a slow rank, on 8 ranks."""

from __future__ import annotations

import time

import numpy as np
import pytest

from hpcpar.checkpoint.verify import latest_set
from hpcpar.config.run_folder import read_lines
from hpcpar.errors import RunError
from hpcpar.parallel.zero import ShardedOptimizer
from hpcpar.train import step
from tests.train.small import make_job
from tests.train.test_runs_on_ranks import figures, folder, run_once, store  # noqa: F401 - fixtures

pytestmark = pytest.mark.mpi
STEPS, BAD_BATCH, OVERFLOW = 28, 15, 19


def spoil(monkeypatch, world, scale_at=0, overflow_at=0, rank=5):
    """Multiply all gradients of one step by 100, and make one rank's overflow in another."""
    original, taken = ShardedOptimizer.finish_reduction, [0]

    def finish_reduction(self):
        original(self)
        taken[0] += 1
        for flat in self.buckets:
            if taken[0] == scale_at:
                flat.grads.mul_(100)
            if taken[0] == overflow_at and world.rank == rank:
                flat.own_grads[:4] = float("inf")

    monkeypatch.setattr(ShardedOptimizer, "finish_reduction", finish_reduction)


@pytest.fixture(autouse=True)
def short_window(monkeypatch):
    monkeypatch.setattr("hpcpar.train.stability.WINDOW", 10)


def long_job(store, **stability):  # noqa: F811
    return make_job(store, layout={"tp": 2, "pp": 2}, checkpoint={"every": 10},
                    model={"dropout": 0.0, "layers": 2, "hidden": 16},
                    train={"steps": STEPS, "precision": "fp32", "microbatch": 4}, data={"validate_every": 0},
                    optim={"lr": 0.001, "decay_steps": STEPS, "clip": 0.0, "betas": [0.9, 0.999]},
                    stability={"check_replicas_every": 5, **stability})


def last_losses(folder):  # noqa: F811
    losses = figures(folder, "loss")
    return float(np.mean([losses[number] for number in range(STEPS - 3, STEPS + 1)]))


@pytest.mark.parametrize("on_spike", ["skip", "rollback"])
def test_a_bad_batch_and_an_overflow_are_left_out_alike_and_the_unguarded_control_diverges(
        world, store, folder, monkeypatch, on_spike):  # noqa: F811
    runs = {}
    for name in ("clean", "guarded", "control") if on_spike == "skip" else ("clean", "guarded"):
        place = type(folder)(folder.path / name)
        place.create()
        world.control.barrier()
        with monkeypatch.context() as patch:
            if name != "clean":
                spoil(patch, world, BAD_BATCH, OVERFLOW)
            if name == "control":
                patch.setattr(step, "distrust", lambda *told: "")
            guard = {"spike": 8.0, "on_spike": on_spike}
            wish = {"guarded": guard, "control": {"check_replicas_every": 0}}.get(name, {})
            done, run = run_once(world, long_job(store, **wish), place)
        states = world.control.all_gather(run.progress.as_dict())
        assert done and all(str(state) == str(states[0]) for state in states)  # str: NaN equals itself
        runs[name] = (run, place)
    run = runs["guarded"][0]
    if on_spike == "skip":
        assert run.progress.updates == STEPS - 2
    else:  # back to step 10 for both: the rollback costs steps, the samples of both bad batches are left out
        assert run.progress.rollbacks == 2 and sum(b - a for a, b in run.progress.left_out) == 16
    if world.rank == 0:
        clean, guarded = (last_losses(runs[name][1]) for name in ("clean", "guarded"))
        assert abs(guarded - clean) < 0.01 * clean, (guarded, clean)
        if on_spike == "skip":
            left_out = {number for number, why in figures(runs["guarded"][1], "skipped").items() if why}
            assert left_out == {BAD_BATCH, OVERFLOW}
            assert not last_losses(runs["control"][1]) < 2 * clean  # NaN, after the overflow


def test_the_samples_of_a_rewound_run_are_those_of_one_that_never_had_them(world, store, folder):  # noqa: F811
    from hpcpar.train.rewind import rewind

    job = make_job(store, layout={"tp": 2}, checkpoint={"every": 2, "keep": 0})
    run_once(world, job, folder)
    before = figures(folder, "samples_hash") if world.rank == 0 else {}
    if world.rank == 0:
        rewind(folder, 2, "16:32")  # the batches of steps 3 and 4
    world.control.barrier()
    done, run = run_once(world, job, folder)
    assert done and run.progress.left_out == [[16, 32]] and run.progress.step == 6
    if world.rank == 0:
        after, first = figures(folder, "samples_hash"), figures(folder, "first_sample")
        assert [after[n] for n in (1, 2, 3, 4)] == [before[n] for n in (1, 2, 5, 6)]
        assert [first[n] for n in range(1, 7)] == [0, 8, 32, 40, 48, 56]
    # the saved state knows it: a later start needs no flag and no request
    if world.rank == 0:
        folder.rewinds.unlink()
    world.control.barrier()
    _, again = run_once(world, job, folder)
    assert again.progress.left_out == [[16, 32]]


@pytest.mark.parametrize(("layout", "name"), [
    ({"tp": 2, "pp": 2}, "layers.3.mlp_norm.weight"),
    ({"zero": 0}, "layers.1.mlp.up.weight"),
    ({"pp": 8, "dp": 1}, "embedding.token.weight"),
    ({"tp": 4, "zero": 3}, "layers.3.mlp_norm.weight"),
    ({"zero": [3, 4]}, "layers.3.mlp.down.weight"),
], ids=["tp", "dp", "tied", "sharded", "hybrid"])
def test_a_drifting_replica_is_named_within_k_steps(world, store, folder, monkeypatch, layout, name):  # noqa: F811
    """One element of one weight on one rank changes by one bit's worth; its moments and gradients stay right."""
    original, taken, perturbed = ShardedOptimizer.update, [0], 7

    def update(self, *told):
        original(self, *told)
        taken[0] += 1
        if taken[0] == 2 and world.rank == perturbed:
            slot, flat = next((slot, flat) for flat in self.buckets for slot in flat.bucket.slots
                              if slot.parameter.name == name)
            weight = flat.kept(slot)
            weight[-1] += 1e-6
            if flat.start <= slot.start + slot.numel - 1 < flat.stop:
                flat.shard["weight"][slot.start + slot.numel - 1 - flat.start] = weight[-1]

    monkeypatch.setattr(ShardedOptimizer, "update", update)
    model = {"layers": 8 if layout.get("pp") == 8 else 4, "hidden": 16}
    job = make_job(store, layout=layout, model=model, train={"steps": 8}, data={"validate_every": 0},
                   stability={"check_replicas_every": 5})
    said = ""
    try:
        run_once(world, job, folder)
    except RunError as error:
        said = str(error)
    said_by = [one for one in world.control.all_gather(said) if one]
    assert said_by and all(name in one and "rank" in one and "7" in one for one in said_by)
    if world.rank == 0:
        assert max(figures(folder, "loss")) == 5 and latest_set(folder.checkpoints) is None


def test_a_slow_rank_is_named_with_its_host(world, store, folder, monkeypatch):  # noqa: F811
    """Rank 5 works 60 ms a step more; waiting for it does not count as the others' work."""
    original = ShardedOptimizer.begin

    def begin(self, *told):
        time.sleep(0.060 * (world.rank == 5))
        original(self, *told)

    monkeypatch.setattr(ShardedOptimizer, "begin", begin)
    job = make_job(store, model={"layers": 1, "hidden": 8, "heads": 2, "dropout": 0.0}, train={"steps": 50},
                   data={"validate_every": 0})
    run_once(world, job, folder)
    if world.rank == 0:
        slow = [line for line in read_lines(folder.metrics) if "slow_rank" in line]
        assert [line["slow_rank"] for line in slow] == [5] and slow[0]["host"] == world.host, slow
