"""What the process's environment says, read once at the door and handed down as a value."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path


@dataclass(frozen=True)
class Surroundings:
    """Where this process was started, as launchers and schedulers tell it through the environment."""

    host: str
    node: str = ""  # the host by the name that Slurm knows; without Slurm that of the host
    rank: int = 0  # of this process, to let one of them speak before MPI is up
    num_tasks: int = 1  # ranks that the launcher or scheduler says it started
    launcher: str = ""  # "srun", "mpirun", or "" for a process started by hand
    job_id: str = ""
    gpus: bool = True  # False: HPCPAR_CPU=1 keeps a GPU machine's ranks on CPU
    share_gpus: bool = False  # True: HPCPAR_SHARE_GPUS=1 lets ranks share a GPU, to try a layout, not for speed
    live: bool = False  # True: HPCPAR_LIVE=1 says that a person watches what mpirun passes on

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Surroundings:
        """Read the variables of Slurm, MPICH (hydra), Open MPI and PMIx from `environment`."""

        def number(*names: str) -> int:
            return next((int(environment[n]) for n in names if environment.get(n, "").isdigit()), 0)

        under_mpirun = number("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
        # SLURM_NTASKS alone is also set in the batch script, where one process is right: only a step has a PROCID
        under_srun = number("SLURM_STEP_NUM_TASKS") if "SLURM_PROCID" in environment else 0
        host = socket.gethostname()
        return cls(
            host=host,
            node=environment.get("SLURMD_NODENAME") or host,
            rank=number("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"),
            num_tasks=max(under_mpirun, under_srun, 1),
            launcher="srun" if under_srun else "mpirun" if under_mpirun else "",
            job_id=environment.get("SLURM_JOB_ID", ""),
            live=environment.get("HPCPAR_LIVE", "") == "1",
            gpus=environment.get("HPCPAR_CPU", "") != "1",
            share_gpus=environment.get("HPCPAR_SHARE_GPUS", "") == "1",
        )


def process_table() -> str:
    """Name the table in which this process has its number: hosts, and containers of one name, have their own."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"


def leave_stdout() -> None:
    """Let what stdout does not take (a reader that has gone, a full disk) go nowhere: Python's end would try again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def mpi_network(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with which pip's mpich starts surely under srun, where nobody has chosen its network.

    Over UCX it publishes 4096 bytes from where a rank's address of about 300 lies, and so whatever lies behind in
    memory. Slurm's pmi2 cuts a request at 1024 bytes: where that memory is full, as it is after torch's import, the
    ranks abort or wait for ever in MPI's start (MPICH 5.0.2, Slurm 22.05). A libfabric address takes 41 bytes. Of
    libfabric's providers MPICH likes `sockets` best where there is no faster network, and over it one start in
    thirty on three nodes waits for ever, too (9 of 280; none of 410 without it).
    """
    if environment.get("MPIR_CVAR_CH4_NETMOD") or not list(distributions(name="mpich")):
        return {}  # an MPICH of the site's may have no libfabric
    return {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": environment.get("FI_PROVIDER") or "^sockets"}
