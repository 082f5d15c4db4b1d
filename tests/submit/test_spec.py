from pathlib import Path

import pytest

from hpcpar.config.job import Job
from hpcpar.config.load import load_job, override
from hpcpar.errors import UserError
from hpcpar.planner.hardware import load_machine
from hpcpar.submit.spec import for_fewer_nodes, resolve_for_nodes, submit_spec


def job(nodes: int, a_node: int, tp: int = 1, pp: int = 1, dp: int | None = None, gpu: str = "h100-80g") -> Job:
    return override(Job(), model={"layers": 12}, layout={"tp": tp, "pp": pp, "dp": dp},
                    train={"global_batch": 1680}, machine={"nodes": nodes, "gpus_per_node": a_node, "gpu": gpu})


def test_the_machine_is_filled_with_replicas():
    resolved = resolve_for_nodes(job(3, 8, tp=4, pp=2))
    assert resolved.layout.dp == 3 and resolved.world_size == 24


def test_the_yuan_job_asks_for_266_nodes():
    wish = override(Job(), model={"layers": 76, "heads": 8, "hidden": 64}, layout={"tp": 8, "pp": 38, "dp": 7},
                    train={"global_batch": 3360}, machine={"nodes": 266, "gpus_per_node": 8, "gpu": "a100-80g"},
                    submit={"partition": "gpu", "account": "us", "exclude": ("n1", "n2"), "walltime_min": 1440,
                            "cpus_per_task": 4})
    spec = submit_spec(resolve_for_nodes(wish), "yuan")
    assert (spec.nodes, spec.tasks_per_node, spec.gpus_per_node, spec.num_tasks) == (266, 8, 8, 2128)
    assert (spec.partition, spec.account, spec.exclude) == ("gpu", "us", ("n1", "n2"))
    assert spec.srun_args == ("--mpi=pmi2", "--kill-on-bad-exit=1", "--distribution=block", "--cpus-per-task=4",
                              "--gpu-bind=none")
    assert spec.signal_lead_s == 600


@pytest.mark.parametrize(("nodes", "a_node", "tp", "pp", "dp", "fix"), [
    (2, 8, 4, 1, 2, "give --machine.nodes 1 or --layout.dp 4"),
    (1, 8, 4, 1, 4, "give --machine.nodes 2 or --layout.dp 2"),
    (2, 8, 1, 1, 4, "give --machine.nodes 1 --machine.gpus_per_node 4 or --layout.dp 16"),
    (3, 4, 2, 1, 3, "give --machine.gpus_per_node 2 or --layout.dp 6"),
    (1, 8, 4, 3, None, "give --machine.nodes 3 --layout.dp 2"),
])
def test_another_number_of_ranks_is_refused_with_a_fix_that_works(nodes, a_node, tp, pp, dp, fix):
    with pytest.raises(UserError) as refusal:
        resolve_for_nodes(job(nodes, a_node, tp, pp, dp))
    assert refusal.value.fix == fix and f"= {nodes * a_node}" in str(refusal.value)
    for way in fix.removeprefix("give ").split(" or "):  # every way out that is named is one
        words = dict(zip(*[iter(way.replace("--", "").split())] * 2, strict=True))
        changes: dict[str, dict[str, int]] = {}
        for name, value in words.items():
            table, key = name.split(".")
            changes.setdefault(table, {})[key] = int(value)
        assert resolve_for_nodes(override(job(nodes, a_node, tp, pp, dp), **changes))


def test_cpu_machines_are_asked_for_no_gpus(tmp_path):
    calibrated = tmp_path / "ours.toml"
    calibrated.write_text('base = "cpu"\n[chip]\ncores = 2\n')
    for gpu in ("cpu", str(calibrated)):
        assert submit_spec(resolve_for_nodes(job(2, 2, gpu=gpu)), "x").gpus_per_node == 0


@pytest.mark.parametrize("profile", sorted(Path("slurm/clusters").glob("*.toml")), ids=lambda p: p.stem)
def test_cluster_profiles_are_of_machines_that_the_planner_knows(profile):
    machine = load_job("jobs/gpt3-125m.toml", cluster=profile).machine
    assert machine.gpu == profile.stem
    assert load_machine(machine.gpu).inside.devices % machine.gpus_per_node == 0


@pytest.mark.parametrize(("walltime_min", "lead_s"), [(1, 30), (5, 60), (60, 360), (1440, 600)])
def test_the_signal_comes_well_before_the_time_limit(walltime_min, lead_s):
    wish = override(job(1, 1), submit={"walltime_min": walltime_min})
    assert submit_spec(resolve_for_nodes(wish), "x").signal_lead_s == lead_s


@pytest.mark.parametrize(("batch", "nodes", "dp"), [(1680, 6, 6), (1680, 3, 3), (14, 6, 2), (7, 6, 1),
                                                    (1680, 0, None)])
def test_fewer_nodes_hold_the_largest_dp_that_divides_the_batch(batch, nodes, dp):
    wish = resolve_for_nodes(override(job(7, 8, tp=4, pp=2), train={"global_batch": batch}))
    smaller = for_fewer_nodes(wish, nodes)
    assert (smaller.layout.dp if smaller else None) == dp
    assert smaller is None or (smaller.world_size == 8 * smaller.machine.nodes and smaller.train == wish.train)


def test_fewer_nodes_keep_whole_runs_of_a_hybrid():
    wish = resolve_for_nodes(override(job(8, 8, tp=4, pp=2), layout={"zero": (2, 4)}, train={"global_batch": 1680 * 8}))
    smaller = for_fewer_nodes(wish, 7)
    assert smaller is not None and (smaller.layout.dp, smaller.layout.zero) == (4, (2, 4))


def test_a_replica_that_ends_inside_a_node_is_not_taken():
    wish = resolve_for_nodes(job(4, 4, tp=2, dp=8))
    smaller = for_fewer_nodes(wish, 3)
    assert smaller is not None and (smaller.layout.dp, smaller.machine.nodes) == (6, 3)


def test_an_elastic_yuan_asks_for_at_least_half_its_replicas():
    wish = override(Job(), model={"layers": 76, "heads": 8, "hidden": 64}, layout={"tp": 8, "pp": 38, "dp": 7},
                    train={"global_batch": 3360}, machine={"nodes": 266, "gpus_per_node": 8, "gpu": "a100-80g"},
                    submit={"elastic": True})
    resolved = resolve_for_nodes(wish)
    spec = submit_spec(resolved, "yuan")
    assert (spec.min_nodes, spec.nodes) == (152, 266)  # dp 4
    lost_one = for_fewer_nodes(resolved, 265)
    assert lost_one is not None and (lost_one.layout.dp, lost_one.machine.nodes) == (6, 228)
