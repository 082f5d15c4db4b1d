"""Submission through submitit: to Slurm, or to this machine; never imports torch or mpi4py."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import sys
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import submitit
from submitit.core.utils import FailedJobError

import hpcpar
from hpcpar.config.load import load_job, to_toml
from hpcpar.config.resolve import resolve
from hpcpar.config.run_folder import RunFolder
from hpcpar.errors import UserError
from hpcpar.planner.recompute import choose_recompute
from hpcpar.submit import ask
from hpcpar.submit.batch import after_srun, before_srun, prologue
from hpcpar.submit.environment import LAUNCHER_PREFIXES, clean
from hpcpar.submit.preflight import check, missing_stores
from hpcpar.submit.snapshot import Snapshot, take_snapshot
from hpcpar.submit.spec import SubmitSpec, resolve_for_nodes, submit_spec
from hpcpar.submit.stage import Staged, stage
from hpcpar.submit.starts import Starts, check_private
from hpcpar.submit.sweep import Point, points, until
from hpcpar.submit.tasks import LocalTask, TrainTask

Executor = Literal["slurm", "local", "debug"]
# what sbatch --dependency takes
_ONE = r"(?:after(?:any|burstbuffer|corr|notok|ok)?(?::\d+(?:_(?:\d+|\*))?(?:\+\d+)?)+|singleton)"
_DEPENDENCY = re.compile(rf"\d+|{_ONE}(?:[,?]{_ONE})*")


@dataclass(frozen=True)
class Request:
    """What is asked of `submit` besides the job."""

    executor: Executor = "slurm"
    cluster: Path | None = None  # a profile: [machine] and [submit] of a job file
    sweep: tuple[str, ...] = ()  # "optim.lr=1e-4,3e-4" each; several make a product
    until: str = ""  # steps, or tokens as 180B
    depend: str = ""  # a job to wait for, or what sbatch --dependency takes
    dry_run: bool = False


@dataclass(frozen=True)
class Submission:
    """What `submit` did: run folders and scripts always; `jobs` (submitit's futures) unless dry."""

    runs: tuple[Path, ...]
    scripts: tuple[Path, ...]
    num_tasks: int
    notes: tuple[str, ...] = ()  # what preflight found worth saying
    jobs: tuple[Any, ...] = ()

    @property
    def job_id(self) -> str:
        """Slurm's job id or the local process id, of the first; empty after a dry run."""
        return str(self.jobs[0].job_id) if self.jobs else ""

    def __str__(self) -> str:
        lines = list(self.notes)
        if not self.jobs:
            lines += [script.read_text() for script in self.scripts]
            lines.append(f"# nothing submitted: {len(self.runs)} x {self.num_tasks} ranks, kept in {self.scripts[0]}")
        lines += [f"job {job.job_id}: {self.num_tasks} ranks, run folder {run}, log {job.paths.stdout}"
                  for run, job in zip(self.runs, self.jobs, strict=False)]
        return "\n".join(lines)


def submit(job_file: Path, overrides: Sequence[str], run: Path, environment: MutableMapping[str, str],
           request: Request | None = None, package: Path | None = None) -> Submission:
    """Prepare the run folder and start the job in it, or only write its script (`dry_run`).

    `environment` is os.environ, handed down by the door: it is clean while the job is handed over, and as before
    afterwards. `package` is the source to freeze; default: the one that is running.

    Raises UserError for a job that cannot run so, and where Slurm or mpirun is missing or refuses.
    """
    request = request or Request()
    slurm, path = request.executor == "slurm", environment.get("PATH", "")
    wished = load_job(job_file, overrides, request.cluster)
    if request.until:
        wished = until(wished, request.until)
    found = [Point(point.name, choose_recompute(resolve_for_nodes(point.job) if slurm else resolve(point.job)))
             for point in points(wished, request.sweep)]
    if slurm and not request.dry_run and shutil.which("sbatch", path=path) is None:
        raise UserError("sbatch", "is not installed here", "submit on a login node of the cluster, look at the script "
                        "with --dry-run, or run on this machine with --executor local")
    if request.depend and not _DEPENDENCY.fullmatch(request.depend):
        raise UserError("--depend", f"{request.depend} names no job", "give a number, or afterok:ID, or what sbatch "
                        "--dependency takes")
    if not slurm and (request.sweep or request.depend):
        raise UserError("--executor", f"{request.executor} knows no --sweep and no --depend", "leave it out")
    folder = RunFolder(run.absolute())  # absolute, for the ranks may start elsewhere
    if slurm and not request.depend:
        _check_alone(folder, bool(request.sweep))
    notes = tuple(dict.fromkeys(note for point in found for note in (*check(point.job, folder),
                                                                     *missing_stores(point.job)))) if slurm else ()
    launch = [] if slurm else _mpirun(found[0].job.world_size, path)  # refused before anything is written
    code = _prepare(folder, found, package or Path(hpcpar.__file__).parent)
    with clean(environment, PYTHONPATH=_python_path(code, environment), PYTHONSAFEPATH="1"):
        if slurm:
            return _to_slurm(job_file.stem, folder, found, code, request, notes)
        return _to_this_machine(submit_spec(found[0].job, job_file.stem), folder, code, launch, request)


def _check_alone(folder: RunFolder, is_sweep: bool) -> None:
    """Refuse a folder that a job runs in, or waits for: two would write the same checkpoints.

    A sweep's folder only holds those of its runs, and may be added to.
    """
    started = {str(line["job"]) for line in Starts(folder).lines()[-1:]}
    submitted = {path.name.partition("_")[0] for path in folder.submission.glob("*_submitted.pkl") if not is_sweep}
    for job_id in sorted(started | submitted):
        job = ask.job_fields(job_id)
        state = job.get("JobState", "")
        # what was submitted locally is a process's number, perhaps some other job's too
        ours = job_id in started or job.get("Command", "").startswith(str(folder.submission))
        if ours and state in ("RUNNING", "PENDING", "SUSPENDED"):
            does = "runs in it" if state == "RUNNING" else f"is to run in it ({state.lower()})"
            raise UserError(str(folder.path), f"job {job_id} {does}", f"give --depend {job_id} to go on when it has "
                            f"ended, scancel {job_id}, or choose another --run folder")


def _prepare(folder: RunFolder, found: Sequence[Point], package: Path) -> Snapshot:
    for each in (folder, *(RunFolder(folder.path / point.name) for point in found if point.name)):
        each.create()
        each.submission.mkdir(mode=0o700, exist_ok=True)
        check_private(each.path, each.submission)  # who can write a pickle there, runs code in the job
    for point in found:
        Starts(RunFolder(folder.path / point.name)).job.write_text(to_toml(point.job))
    return take_snapshot(package, folder.submission)


def _to_slurm(name: str, folder: RunFolder, found: Sequence[Point], code: Snapshot, request: Request,
              notes: tuple[str, ...]) -> Submission:
    runs, scripts, jobs = [], [], []
    num_tasks = found[0].job.world_size
    staged = stage(found[0].job.submit, folder.path.parent, request.dry_run)
    for number, batch in enumerate(_arrays(found)):
        # an array has one script: its elements find their run folders in this list, which a later sweep must not change
        listing = "".join(f"{folder.path / point.name}\n" for point in batch)
        listed = folder.submission / f"runs-{hashlib.sha256(listing.encode()).hexdigest()[:8]}.txt"
        listed.write_text(listing)
        parameters = slurm_parameters(submit_spec(batch[0].job, name), code, staged, listed, request.depend)
        runs += [folder.path / point.name for point in batch]
        if request.dry_run:
            paper = _OnPaper(folder=folder.submission, python=staged.python)
            paper.update_parameters(**parameters)
            scripts.append(folder.submission / f"dry-run{f'-{number}' if number else ''}.sh")
            scripts[-1].write_text(paper.script())
            continue
        # submitit counts the requeues after a time limit; a long run has many
        executor = submitit.SlurmExecutor(folder=folder.submission, max_num_timeout=10_000, python=staged.python)
        executor.update_parameters(**parameters)
        try:
            with executor.batch():
                futures = [executor.submit(TrainTask(str(folder.path / point.name))) for point in batch]
            jobs += futures
        except FailedJobError as error:
            lines = [line for line in str(error).splitlines() if "error" in line] or str(error).splitlines()[-1:]
            refused = "refused: " + " ".join(lines)
            raise UserError("sbatch", refused, "see [submit] and [machine] in the job, or --dry-run") from None
        scripts.append(Path(jobs[-1].paths.submission_file))
    return Submission(tuple(runs), tuple(scripts), num_tasks, notes, tuple(jobs))


def _arrays(found: Sequence[Point]) -> list[list[Point]]:
    """Part a sweep into job arrays: those that ask for the same, and no more than Slurm's MaxArraySize."""
    if len(found) == 1:
        return [list(found)]
    largest, arrays = ask.max_array_size(), []
    alike: dict[SubmitSpec, list[Point]] = {}
    for point in found:
        alike.setdefault(submit_spec(point.job, ""), []).append(point)
    for group in alike.values():
        arrays += [group[first:first + largest] for first in range(0, len(group), largest)]
    return arrays


def slurm_parameters(spec: SubmitSpec, code: Snapshot, staged: Staged, listed: Path,
                     depend: str = "") -> dict[str, Any]:
    """Return the request in submitit's words; what was not asked for is left to the cluster's defaults.

    All that hpcpar knows of sbatch is here, in `spec.srun_args` and in `batch`.
    """
    gpus = {"gres": f"{spec.gres}:{spec.gpus_per_node}"} if spec.gres else {"gpus_per_node": spec.gpus_per_node}
    asked = {"partition": spec.partition, "account": spec.account, "exclude": ",".join(spec.exclude),
             "constraint": spec.constraint, **(gpus if spec.gpus_per_node else {}),
             "dependency": f"afterany:{depend}" if depend.isdigit() else depend}
    nodes = {"nodes": f"{spec.min_nodes}-{spec.nodes}"} if spec.min_nodes < spec.nodes else {}
    python = shlex.quote(sys.executable)
    run = f'"$(sed -n "$((${{SLURM_ARRAY_TASK_ID:-0}} + 1))p" {shlex.quote(str(listed))})"'
    return {
        "job_name": spec.name, "nodes": spec.nodes, "ntasks_per_node": spec.tasks_per_node,
        "cpus_per_task": spec.cpus_per_task, "time": spec.walltime_min, "signal_delay_s": spec.signal_lead_s,
        "stderr_to_stdout": True, "srun_args": list(spec.srun_args),
        "additional_parameters": {"requeue": True, **nodes},
        # after the user's modules, which may set PYTHONPATH themselves
        "setup": [*spec.setup, *_exports(code), *before_srun(python, run, str(listed.parent)), *staged.lines,
                  *prologue(python, staged.python, spec.mpi)],
        "teardown": after_srun(python),
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


def _to_this_machine(spec: SubmitSpec, folder: RunFolder, code: Snapshot, launch: list[str],
                     request: Request) -> Submission:
    num_tasks = int(launch[-1]) if launch else 1
    train = [sys.executable, "-m", "hpcpar.entry", "train", str(Starts(folder).job), "--run", str(folder.path)]
    stale = " ".join(f'"${{!{prefix}@}}"' for prefix in LAUNCHER_PREFIXES)
    script = folder.submission / "local.sh"
    script.write_text("\n".join(["#!/bin/bash", f"unset {stale}", *spec.setup, *_exports(code),
                                 "exec " + shlex.join([*launch, *train]), ""]))
    if request.dry_run:
        return Submission((folder.path,), (script,), num_tasks)
    kind: Any = submitit.LocalExecutor if request.executor == "local" else submitit.DebugExecutor
    local = kind(folder=folder.submission)
    local.update_parameters(timeout_min=spec.walltime_min, signal_delay_s=spec.signal_lead_s,
                            gpus_per_node=spec.gpus_per_node, stderr_to_stdout=True)
    return Submission((folder.path,), (script,), num_tasks, (), (local.submit(LocalTask(str(script))),))


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
