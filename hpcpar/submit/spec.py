"""What Slurm is asked for, as a value that follows from the job alone."""

from __future__ import annotations

from dataclasses import dataclass

from hpcpar.config.job import Job
from hpcpar.config.load import override
from hpcpar.config.resolve import resolve
from hpcpar.errors import UserError


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
    exclude: tuple[str, ...]
    setup: tuple[str, ...]
    srun_args: tuple[str, ...]

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


def submit_spec(job: Job, name: str) -> SubmitSpec:
    """Return what to ask Slurm for, for a job that `resolve_for_nodes` returned."""
    wish, walltime_s = job.submit, 60 * job.submit.walltime_min
    return SubmitSpec(
        name=name,
        nodes=job.machine.nodes,
        tasks_per_node=job.machine.gpus_per_node,
        gpus_per_node=0 if job.machine.gpu == "cpu" else job.machine.gpus_per_node,
        cpus_per_task=wish.cpus_per_task,
        walltime_min=wish.walltime_min,
        # a tenth of the time, 1 to 10 minutes: for one step, one save, and the scheduler's lateness (up to a minute)
        signal_lead_s=min(max(60, min(600, walltime_s // 10)), walltime_s // 2),
        partition=wish.partition,
        account=wish.account,
        exclude=wish.exclude,
        setup=wish.setup,
        # one dead rank ends the step; srun does not take over sbatch's --cpus-per-task since Slurm 22.05
        srun_args=(f"--mpi={wish.mpi}", "--kill-on-bad-exit=1", f"--cpus-per-task={wish.cpus_per_task}"),
    )
