"""What is refused before anything is submitted, with numbers: memory, time, and what the partition gives."""

from __future__ import annotations

import math
import re
from pathlib import Path

from hpcpar.config.job import Job
from hpcpar.config.run_folder import RunFolder, read_lines
from hpcpar.errors import UserError, did_you_mean
from hpcpar.planner.hardware import known_machines
from hpcpar.planner.plan import Plan, make_plan
from hpcpar.planner.search import remedies
from hpcpar.submit import ask
from hpcpar.submit.spec import fewest_nodes, for_fewer_nodes, submit_spec
from hpcpar.units import format_bytes, format_seconds

START_S = 120.0  # of a large job: imports, communicators, reading a checkpoint
SECRET = re.compile(r"\b(\w*(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL)\w*)=\S", re.IGNORECASE)


def check(job: Job, folder: RunFolder) -> list[str]:
    """Raise UserError for a resolved job that cannot run as asked; return what else is worth saying."""
    _check_secrets(job)
    plan = _foretold(job)
    if plan is not None:
        smallest = for_fewer_nodes(job, fewest_nodes(job)) if job.submit.elastic else None
        _check_memory(make_plan(smallest) if smallest else plan)  # a smaller dp leaves each rank a larger shard
    step_s = measured_step_s(folder) or (plan.time.total if plan else None)
    return [*_check_partition(job), *(_check_time(job, step_s) if step_s else [])]


def missing_stores(job: Job) -> list[str]:
    """Tell of text that is not there (yet): it may be made while the job waits, and a start says so otherwise."""
    stores = [job.data.store] if isinstance(job.data.store, str) else [path for path, _ in job.data.store]
    return [f"data.store: {path} is not there from here; the job will end at once unless it is by then: "
            "hpcpar data build TEXT... --out STORE" for path in stores if not Path(path).is_dir()]


def _foretold(job: Job) -> Plan | None:
    """Return the planner's word on a job; None on CPUs and on a GPU that it does not know."""
    known = job.machine.gpu in known_machines() or Path(job.machine.gpu).is_file()
    return make_plan(job) if known and job.machine.gpu != "cpu" else None


def _check_memory(plan: Plan) -> None:
    if not plan.pricing.host_fits:
        raise UserError("layout.recompute", f"{format_bytes(plan.pricing.host_bytes)} of a rank's activations are to "
                        f"wait in the host's memory, of which a {plan.machine.name}'s share is "
                        f"{plan.machine.host.share_gib:g} GiB", " or ".join(remedies(plan)) or 'write "full"')
    if not plan.fits:
        needed, usable = plan.memory[plan.fullest].total, plan.machine.chip.usable_bytes
        raise UserError("machine.gpu", f"a rank of stage {plan.fullest} needs {format_bytes(needed)} at dp "
                        f"{plan.job.layout.dp}, and {plan.machine.name} gives {format_bytes(usable)}",
                        " or ".join(remedies(plan)) or "see hpcpar plan --search")


def _check_secrets(job: Job) -> None:
    for line in job.submit.setup:
        if found := SECRET.search(line):
            raise UserError("submit.setup", f"sets {found[1]}, and would be kept in the run folder and in every "
                            "checkpoint", f"export {found[1]} in the shell before submitting: the job gets it")


def _check_time(job: Job, step_s: float) -> list[str]:
    """Hold the time limit against what a start, a checkpoint interval and the stop before the end take."""
    spec, limit_s = submit_spec(job, ""), 60.0 * job.submit.walltime_min
    if step_s > spec.signal_lead_s / 2:
        longer = math.ceil(20 * step_s / 60)  # the lead is a tenth of it, 10 minutes at most
        raise UserError("submit.walltime_min", f"a step takes {format_seconds(step_s)}, but the signal comes only "
                        f"{format_seconds(spec.signal_lead_s)} before the end: no time to finish it and save",
                        f"write walltime_min = {longer}" if longer <= 100 else "make the step shorter")
    every = job.checkpoint.every if isinstance(job.checkpoint.every, int) else 0
    needed_s = START_S + max(1, every) * step_s + spec.signal_lead_s
    if needed_s > limit_s:
        raise UserError("submit.walltime_min", f"{job.submit.walltime_min} minutes do not hold a start "
                        f"({format_seconds(START_S)}), one checkpoint interval ({max(1, every)} steps of "
                        f"{format_seconds(step_s)}) and the stop before the end ({format_seconds(spec.signal_lead_s)})",
                        f"write walltime_min = {int(needed_s / 60 * 1.2) + 1}, or save more often")
    starts = math.ceil(job.train.steps / max(1, int((limit_s - START_S - spec.signal_lead_s) / step_s)))
    return [f"about {format_seconds(job.train.steps * step_s)} of steps: {starts} start{'s' * (starts != 1)} of "
            f"{format_seconds(limit_s)}"]


def measured_step_s(folder: RunFolder) -> float | None:
    """Return the median time of the last steps that this run folder knows of, or None."""
    try:
        steps = sorted(line["step_s"] for line in read_lines(folder.metrics)[-50:] if "step_s" in line)
    except OSError:
        return None
    return steps[len(steps) // 2] if steps else None


def _check_partition(job: Job) -> list[str]:
    """Hold the request against what Slurm says of the partition; sbatch itself takes jobs that can never start."""
    wish, spec = job.submit, submit_spec(job, "")
    known = ask.partitions()
    name = wish.partition or next((n for n, f in (known or {}).items() if f.get("Default") == "YES"), "")
    if known is not None and name and name not in known:
        raise UserError("submit.partition", f"{name} is not a partition here", did_you_mean(name, known))
    found = ask.partition(known[name]) if known and name else None
    limit = found.max_minutes if found else None
    if limit is not None and wish.walltime_min > limit:
        raise UserError("submit.walltime_min", f"{wish.walltime_min} minutes, but {name or 'the cluster'} gives "
                        f"{limit}", f"write walltime_min = {limit}: the run goes on by itself in the next job")
    if found is None:
        return []
    if found.max_nodes is not None and spec.min_nodes > found.max_nodes:
        raise UserError("machine.nodes", f"{spec.min_nodes}, but partition {name} gives a job {found.max_nodes}",
                        "choose another partition or a smaller layout")
    return _check_nodes(job, found) if found.nodes else []


def _check_nodes(job: Job, found: ask.Partition) -> list[str]:
    """Hold the request against what the nodes of a partition have."""
    wish, machine, spec = job.submit, job.machine, submit_spec(job, "")
    cpus, gpus = machine.gpus_per_node * wish.cpus_per_task, spec.gpus_per_node
    wanted = {word for word in re.split(r"[&,]", wish.constraint) if re.fullmatch(r"\w+", word)}
    steps = [
        ("machine.nodes", "", list(found.nodes)),
        ("submit.exclude", "are not excluded", [n for n in found.nodes if n.name not in wish.exclude]),
        ("submit.constraint", f"have {wish.constraint}", [n for n in found.nodes if wanted <= n.features]),
        ("submit.cpus_per_task", f"have {machine.gpus_per_node} x {wish.cpus_per_task} = {cpus} cores",
         [n for n in found.nodes if n.cpus >= cpus]),
        ("machine.gpus_per_node", f"have {gpus} GPUs", [n for n in found.nodes if n.gpus >= gpus]),
    ]
    for where, what, nodes in steps:
        if len(nodes) < spec.min_nodes:
            of_them = f", of which {len(nodes)} {what}" if what else ""
            raise UserError(where, f"{spec.min_nodes} nodes are needed; partition {found.name} has {len(found.nodes)}"
                            f"{of_them}", _what_would_do(where, found, spec.min_nodes))
    fit = set.intersection(*({n.name for n in nodes} for _, _, nodes in steps))
    ready = sum(n.usable for n in found.nodes if n.name in fit)
    return [] if ready >= spec.nodes else [f"{ready} of the {spec.nodes} nodes are in service now: the job will wait"]


def _what_would_do(where: str, found: ask.Partition, nodes: int) -> str:
    """Name the most that enough nodes have."""
    if where in ("submit.cpus_per_task", "machine.gpus_per_node"):
        have = sorted((n.cpus if "cpus" in where else n.gpus for n in found.nodes), reverse=True)
        most = have[nodes - 1] if len(have) >= nodes else 0
        return f"{nodes} nodes have {most} each"
    return "choose another partition or a smaller layout"
