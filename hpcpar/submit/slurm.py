"""Submission through submitit: to Slurm, or to this machine; never imports torch or mpi4py."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import submitit
from submitit.core.utils import FailedJobError

import hpcpar
from hpcpar.config.job import Job
from hpcpar.config.load import load_job, to_toml
from hpcpar.config.resolve import resolve
from hpcpar.config.run_folder import RunFolder
from hpcpar.errors import UserError
from hpcpar.submit.snapshot import Snapshot, take_snapshot
from hpcpar.submit.spec import SubmitSpec, resolve_for_nodes, submit_spec
from hpcpar.submit.tasks import LocalTask, TrainTask

Executor = Literal["slurm", "local", "debug"]

# What launchers and schedulers leave in a shell. SBATCH_* overrules the script; SLURM_CPU_BIND pins all ranks to
# a few cores; PMI_* makes a new mpirun believe that it is a rank of another.
LAUNCHER_PREFIXES = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "PMI_", "PMIX_", "OMPI_", "PRTE_",
                     "HYDI_", "HYDRA_", "MPI_LOCAL", "SUBMITIT_")
KEPT = ("SLURM_CONF",)  # where Slurm's own commands find the cluster


@dataclass(frozen=True)
class Submission:
    """What `submit` did: the run folder and script always; `job` (submitit's future) and its id unless dry."""

    run: Path
    script: Path
    code: Snapshot
    num_tasks: int
    job: Any = None

    @property
    def job_id(self) -> str:
        """Slurm's job id or the local process id; empty after a dry run."""
        return "" if self.job is None else str(self.job.job_id)

    @property
    def log(self) -> Path | None:
        """What rank 0 (Slurm) or all ranks (local) print."""
        return None if self.job is None else Path(self.job.paths.stdout)

    def __str__(self) -> str:
        if self.job is None:
            return f"{self.script.read_text()}\n# nothing submitted: {self.num_tasks} ranks, kept in {self.script}"
        return f"job {self.job_id}: {self.num_tasks} ranks, run folder {self.run}, log {self.log}"


def submit(job_file: Path, overrides: Sequence[str], run: Path, environment: MutableMapping[str, str],
           executor: Executor = "slurm", dry_run: bool = False, package: Path | None = None) -> Submission:
    """Prepare the run folder and start the job in it, or only write its script (`dry_run`).

    `environment` is os.environ, handed down by the door: it is clean while the job is handed over, and as before
    afterwards. `package` is the source to freeze; default: the one that is running.

    Raises UserError for a job that cannot run so, and where Slurm or mpirun is missing or refuses.
    """
    wished = load_job(job_file, overrides)
    job = resolve_for_nodes(wished) if executor == "slurm" else resolve(wished)
    path = environment.get("PATH", "")
    if executor == "slurm" and not dry_run and shutil.which("sbatch", path=path) is None:
        raise UserError("sbatch", "is not installed here", "submit on a login node of the cluster, look at the script "
                        "with --dry-run, or run on this machine with --executor local")
    spec = submit_spec(job, job_file.stem)
    # absolute, for the ranks may start elsewhere
    folder = RunFolder(run.absolute())
    launch = [] if executor == "slurm" else _mpirun(job.world_size, path)  # refused before anything is written
    code = _prepare(folder, job, package or Path(hpcpar.__file__).parent)
    with _clean(environment, _python_path(code, environment)):
        if executor == "slurm":
            return _to_slurm(spec, folder, code, dry_run)
        return _to_this_machine(spec, folder, code, launch, executor, dry_run)


def _prepare(folder: RunFolder, job: Job, package: Path) -> Snapshot:
    folder.create()
    beneath = folder.path / "submit"
    beneath.mkdir(exist_ok=True)
    beneath.chmod(0o700)  # submitit's pickles lie here: who can write one, runs code in the job
    folder.config.write_text(to_toml(job))
    return take_snapshot(package, beneath)


def _to_slurm(spec: SubmitSpec, folder: RunFolder, code: Snapshot, dry_run: bool) -> Submission:
    beneath = folder.path / "submit"
    if dry_run:
        script, paper = beneath / "dry-run.sh", _OnPaper(folder=beneath)
        paper.update_parameters(**slurm_parameters(spec, code))
        script.write_text(paper.script())
        return Submission(folder.path, script, code, spec.num_tasks)
    # submitit counts the requeues after a time limit; a long run has many
    executor = submitit.SlurmExecutor(folder=beneath, max_num_timeout=10_000)
    executor.update_parameters(**slurm_parameters(spec, code))
    try:
        job = executor.submit(TrainTask(str(folder.path)))
    except FailedJobError as error:
        lines = [line for line in str(error).splitlines() if "error" in line] or str(error).splitlines()[-1:]
        refused = "refused: " + " ".join(lines)
        raise UserError("sbatch", refused, "see [submit] and [machine] in the job, or --dry-run") from None
    return Submission(folder.path, Path(job.paths.submission_file), code, spec.num_tasks, job)


def slurm_parameters(spec: SubmitSpec, code: Snapshot) -> dict[str, Any]:
    """Return the spec in submitit's words; what was not asked for is left to the cluster's defaults."""
    asked = {"partition": spec.partition, "account": spec.account, "exclude": ",".join(spec.exclude),
             "gpus_per_node": spec.gpus_per_node}
    return {
        "job_name": spec.name, "nodes": spec.nodes, "ntasks_per_node": spec.tasks_per_node,
        "cpus_per_task": spec.cpus_per_task, "time": spec.walltime_min, "signal_delay_s": spec.signal_lead_s,
        "stderr_to_stdout": True, "srun_args": list(spec.srun_args), "additional_parameters": {"requeue": True},
        "setup": [*spec.setup, *_exports(code)],  # after the user's modules, which may set PYTHONPATH themselves
        **{name: value for name, value in asked.items() if value},
    }


class _OnPaper(submitit.SlurmExecutor):
    """submitit's Slurm executor where Slurm is absent: makes the script, submits nothing."""

    @classmethod
    def affinity(cls) -> int:
        """Say that Slurm is there."""
        return 1

    def script(self) -> str:
        """Return what `sbatch` would be given."""
        return str(self._make_submission_file_text(self._submitit_command_str, ""))


def _to_this_machine(spec: SubmitSpec, folder: RunFolder, code: Snapshot, launch: list[str], kind: Executor,
                     dry_run: bool) -> Submission:
    beneath, num_tasks = folder.path / "submit", int(launch[-1]) if launch else 1
    train = [sys.executable, "-m", "hpcpar.entry", "train", str(folder.config), "--run", str(folder.path)]
    stale = " ".join(f'"${{!{prefix}@}}"' for prefix in LAUNCHER_PREFIXES)
    script = beneath / "local.sh"
    script.write_text("\n".join(["#!/bin/bash", f"unset {stale}", *spec.setup, *_exports(code),
                                 "exec " + shlex.join([*launch, *train]), ""]))
    if dry_run:
        return Submission(folder.path, script, code, num_tasks)
    local: Any = (submitit.LocalExecutor if kind == "local" else submitit.DebugExecutor)(folder=beneath)
    local.update_parameters(timeout_min=spec.walltime_min, signal_delay_s=spec.signal_lead_s,
                            gpus_per_node=spec.gpus_per_node, stderr_to_stdout=True)
    return Submission(folder.path, script, code, num_tasks, local.submit(LocalTask(str(script))))


def _mpirun(num_ranks: int, path: str) -> list[str]:
    """Return the words that start `num_ranks` of a command: none for one rank."""
    if num_ranks == 1:
        return []
    beside = str(Path(sys.executable).parent)  # pip's mpich lies beside the interpreter whose mpi4py uses it
    found = shutil.which("mpirun", path=f"{beside}:{path}")
    if found is None:
        raise UserError("mpirun", f"is not installed, and {num_ranks} ranks need it", "pip install mpich")
    return [found, "-n", str(num_ranks)]


def _exports(code: Snapshot) -> list[str]:
    # safe path: `python -m` would put the working folder, perhaps the checkout, before the snapshot
    return [f"export PYTHONPATH={shlex.quote(str(code.folder))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "export PYTHONSAFEPATH=1"]


def _python_path(code: Snapshot, environment: MutableMapping[str, str]) -> str:
    return ":".join(filter(None, [str(code.folder), environment.get("PYTHONPATH", "")]))


@contextmanager
def _clean(environment: MutableMapping[str, str], python_path: str) -> Iterator[None]:
    """Take launchers' variables out of `environment` and put the snapshot in; put all back afterwards."""
    before = dict(environment)
    for name in before:
        if name.startswith(LAUNCHER_PREFIXES) and name not in KEPT:
            del environment[name]
    environment.update({"PYTHONPATH": python_path, "PYTHONSAFEPATH": "1"})
    try:
        yield
    finally:
        environment.clear()
        environment.update(before)
