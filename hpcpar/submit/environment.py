"""The variables that launchers and schedulers leave in a shell, and how to keep them out of the next job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

# SBATCH_* overrules the script; SLURM_CPU_BIND pins all ranks to a few cores; PMI_* makes a new mpirun believe that it
# is a rank of another.
LAUNCHER_PREFIXES = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "PMI_", "PMIX_", "OMPI_", "PRTE_",
                     "HYDI_", "HYDRA_", "MPI_LOCAL", "SUBMITIT_")
KEPT = ("SLURM_CONF",)  # where Slurm's own commands find the cluster


def without_launchers(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` without what launchers and schedulers have put there."""
    return {name: value for name, value in environment.items()
            if name in KEPT or not name.startswith(LAUNCHER_PREFIXES)}


@contextmanager
def clean(environment: MutableMapping[str, str], **more: str) -> Iterator[None]:
    """Take launchers' variables out of `environment` and put `more` in; put all back afterwards."""
    before = dict(environment)
    wanted = without_launchers(before) | more
    try:
        environment.clear()
        environment.update(wanted)
        yield
    finally:
        environment.clear()
        environment.update(before)
