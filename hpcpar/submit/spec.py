"""What Slurm is asked for, as a value that follows from the job alone."""

from __future__ import annotations

from dataclasses import dataclass

from hpcpar.config.job import Job, required
from hpcpar.config.load import override
from hpcpar.config.resolve import resolve
from hpcpar.errors import UserError
from hpcpar.planner.hardware import is_cpu


@dataclass(frozen=True)
class SubmitSpec:
    """The request for one run: `nodes` x `tasks_per_node` ranks."""

    name: str
    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    cpus_per_task: int
    walltime_min: int
    signal_lead_s: int  # the ranks are told this long before the time limit
    partition: str
    account: str
    constraint: str
    gres: str
    exclude: tuple[str, ...]
    setup: tuple[str, ...]
    mpi: str
    srun_args: tuple[str, ...]
    min_nodes: int  # fewer than `nodes` where the job is elastic

    @property
    def num_tasks(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.tasks_per_node


def resolve_for_nodes(job: Job) -> Job:
    """Resolve `job` for the ranks that its [machine] has; `layout.dp` takes what tp x pp x cp leave of them.

    Raises UserError where the layout is not as large as nodes x gpus_per_node, with the nearest fix.
    """
    machine, layout = job.machine, job.layout
    num_tasks, replica = machine.nodes * machine.gpus_per_node, layout.tp * layout.pp * layout.cp
    job = resolve(override(job, layout={"dp": layout.dp or max(1, num_tasks // replica)}))
    if job.world_size != num_tasks:
        raise UserError(
            "layout", f"tp {layout.tp} x pp {layout.pp} x dp {job.layout.dp} = {job.world_size} ranks, but [machine] "
            f"has {machine.nodes} nodes x {machine.gpus_per_node} a node = {num_tasks}", _nearest_fix(job, replica))
    return job


def _nearest_fix(job: Job, replica: int) -> str:
    nodes, a_node, size = job.machine.nodes, job.machine.gpus_per_node, job.world_size
    fixes = []
    if size % a_node == 0:
        fixes.append(f"--machine.nodes {size // a_node}")
    elif size < a_node:
        fixes.append(f"--machine.nodes 1 --machine.gpus_per_node {size}")
    elif size % nodes == 0 and size // nodes < a_node:  # a node does not grow GPUs
        fixes.append(f"--machine.gpus_per_node {size // nodes}")
    if nodes * a_node % replica == 0:
        fixes.append(f"--layout.dp {nodes * a_node // replica}")
    if not fixes:  # whole nodes that hold whole replicas
        whole = next(n for n in range(max(1, size // a_node), size * replica + 1) if n * a_node % replica == 0)
        fixes.append(f"--machine.nodes {whole} --layout.dp {whole * a_node // replica}")
    return "give " + " or ".join(fixes)


def for_fewer_nodes(job: Job, nodes: int) -> Job | None:
    """Return a resolved job with the largest legal dp that `nodes` whole nodes hold, or None if there is none.

    The global batch stays, so the same samples make the same steps; only microbatches a replica grow.
    """
    a_node, replica = job.machine.gpus_per_node, job.layout.tp * job.layout.pp * job.layout.cp
    for dp in range(min(required(job.layout.dp), nodes * a_node // replica), 0, -1):
        if dp * replica % a_node:
            continue
        smaller = override(job, layout={"dp": dp}, machine={"nodes": dp * replica // a_node})
        try:
            return resolve(smaller)
        except UserError:
            continue  # this dp does not divide the batch, or the ramp
    return None


def fewest_nodes(job: Job) -> int:
    """Return the least number of nodes that an elastic job takes: those of the smallest dp of at least half."""
    legal = job
    while (smaller := for_fewer_nodes(legal, legal.machine.nodes - 1)) is not None:
        if 2 * required(smaller.layout.dp) < required(job.layout.dp):
            break
        legal = smaller
    return legal.machine.nodes


def submit_spec(job: Job, name: str) -> SubmitSpec:
    """Return what to ask Slurm for, for a job that `resolve_for_nodes` returned."""
    wish, walltime_s = job.submit, 60 * job.submit.walltime_min
    return SubmitSpec(
        name=name,
        nodes=job.machine.nodes,
        tasks_per_node=job.machine.gpus_per_node,
        gpus_per_node=0 if is_cpu(job.machine.gpu) else job.machine.gpus_per_node,
        cpus_per_task=wish.cpus_per_task,
        walltime_min=wish.walltime_min,
        # a tenth of the time, 1 to 10 minutes: for one step, one save, and the scheduler's lateness (up to a minute)
        signal_lead_s=min(max(60, min(600, walltime_s // 10)), walltime_s // 2),
        partition=wish.partition,
        account=wish.account,
        constraint=wish.constraint,
        gres=wish.gres,
        exclude=wish.exclude,
        setup=wish.setup,
        mpi=wish.mpi,
        srun_args=srun_args(job),
        min_nodes=fewest_nodes(job) if wish.elastic else job.machine.nodes,
    )


def srun_args(job: Job) -> tuple[str, ...]:
    """Return what srun needs besides what it takes over from sbatch."""
    return (
        f"--mpi={job.submit.mpi}",
        "--kill-on-bad-exit=1",  # one dead rank ends the step
        "--distribution=block",  # consecutive ranks on a node: tp stays inside it, whatever the site's default
        f"--cpus-per-task={job.submit.cpus_per_task}",  # not taken over from sbatch since Slurm 22.05
        # All GPUs of the node stay visible and a rank takes the one of its local rank: bound one by one (by cgroups),
        # NCCL could not use NVLink between them
        *(() if is_cpu(job.machine.gpu) else ("--gpu-bind=none",)),
    )
