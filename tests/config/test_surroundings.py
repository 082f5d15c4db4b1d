"""What launchers and schedulers say through the environment."""

from __future__ import annotations

import os

import pytest

from hpcpar import cli
from hpcpar.config.surroundings import Surroundings, mpi_network

HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "8"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8"}
BATCH = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8"}
SRUN = {**BATCH, "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}


@pytest.mark.parametrize(("environment", "rank", "num_tasks", "launcher", "job_id"), [
    ({}, 0, 1, "", ""),
    (HYDRA, 3, 8, "mpirun", ""),
    (OPEN_MPI, 3, 8, "mpirun", ""),
    (SRUN, 3, 8, "srun", "77"),
    ({**SRUN, **HYDRA}, 3, 8, "srun", "77"),
    (BATCH, 0, 1, "", "77"),
    ({**BATCH, **HYDRA}, 3, 8, "mpirun", "77"),
    ({**BATCH, "SLURM_PROCID": "0"}, 0, 1, "", "77"),
    ({"SLURM_STEP_NUM_TASKS": "8"}, 0, 1, "", ""),
    # hydra starts one proxy a node through srun: the ranks are hydra's, not the step's
    ({**BATCH, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", **HYDRA}, 3, 8, "srun", "77"),
    ({"PMI_RANK": "", "PMI_SIZE": "x"}, 0, 1, "", ""),
    ({"PMI_RANK": "-1", "PMI_SIZE": "0"}, 0, 1, "", ""),
])
def test_ranks_tasks_and_launcher(
    environment: dict[str, str], rank: int, num_tasks: int, launcher: str, job_id: str
) -> None:
    found = Surroundings.read(environment)
    assert (found.rank, found.num_tasks, found.launcher, found.job_id) == (rank, num_tasks, launcher, job_id)
    assert found.host


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False)])
def test_flags_are_on_only_when_they_say_1(value: str, on: bool) -> None:
    assert Surroundings.read({"HPCPAR_LIVE": value}).live is on
    assert Surroundings.read({"HPCPAR_CPU": value}).gpus is not on
    assert Surroundings.read({}).gpus and not Surroundings.read({}).live


def test_the_process_environment_itself_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**HYDRA, **SRUN, "HPCPAR_LIVE": "1"}.items():
        monkeypatch.setenv(name, value)
    host = Surroundings.read({}).host
    assert Surroundings.read({}) == Surroundings(host=host, node=host)


OFI = {"MPIR_CVAR_CH4_NETMOD": "ofi"}


@pytest.mark.parametrize(("chosen", "installed", "added"), [
    ({}, True, {**OFI, "FI_PROVIDER": "^sockets"}),
    ({"FI_PROVIDER": "verbs"}, True, {**OFI, "FI_PROVIDER": "verbs"}),
    ({"MPIR_CVAR_CH4_NETMOD": "ucx"}, True, {}),
    ({}, False, {}),
])
def test_pips_mpich_is_told_its_network_where_nobody_has_chosen(monkeypatch, chosen, installed, added):
    monkeypatch.setattr("hpcpar.config.surroundings.distributions", lambda name: [name] * installed)
    assert mpi_network(chosen) == added


@pytest.mark.parametrize(("started", "told"), [(SRUN, True), (HYDRA, False), ({}, False)])
def test_a_rank_started_by_hand_is_told_too(monkeypatch, capsys, started, told):
    monkeypatch.setattr("hpcpar.config.surroundings.distributions", lambda name: [name])
    for name, value in {**started, "MPIR_CVAR_CH4_NETMOD": "", "FI_PROVIDER": ""}.items():
        monkeypatch.setenv(name, value)
    cli.main(["schedule", "--help-me"])
    assert os.environ["MPIR_CVAR_CH4_NETMOD"] == ("ofi" if told else "")
