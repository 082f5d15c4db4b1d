"""From started processes to a world of ranks: mpi4py -> host map -> store address over MPI -> torch's process group."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from hpcpar.comm.control import Alone, Control, OverMPI
from hpcpar.comm.failure import await_reader
from hpcpar.config.surroundings import Surroundings
from hpcpar.errors import UserError


@dataclass
class World:
    """This process's place among the ranks, and how to reach the others."""

    control: Control
    host: str
    device: torch.device
    communicator: Any = None  # mpi4py's, or None for a single process
    over_mpi: bool = True  # exchange tensors over MPI; False: over NCCL, for which each rank has a GPU of its own
    seconds: dict[str, float] = field(default_factory=dict)  # by phase of the bootstrap

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.control.rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.control.size

    def abort(self, code: int) -> None:
        """End all ranks now, without a collective; what this one has printed comes through."""
        if self.communicator is not None:
            for stream in (1, 2):
                with contextlib.suppress(OSError):
                    await_reader(stream)
            self.communicator.Abort(code)
        os._exit(code)


def connect(surroundings: Surroundings) -> World:
    """Find the other ranks over MPI, without torch's groups yet.

    A process that no launcher started is alone and never initialises MPI.
    Raises UserError where the launcher started more tasks than MPI sees: each would train alone.
    """
    start = time.perf_counter()
    if not surroundings.launcher:
        return World(Alone(), surroundings.host, _device(surroundings, 0))
    from mpi4py import MPI  # initialises MPI; a process by itself needs no MPI runtime at all

    communicator = MPI.COMM_WORLD
    if communicator.Get_size() < surroundings.num_tasks:
        raise UserError(
            surroundings.launcher,
            f"started {surroundings.num_tasks} tasks, but MPI sees {communicator.Get_size()} rank: "
            "launcher and MPI library do not talk",
            "under Slurm use srun --mpi=pmi2 with pip's mpich; else the mpirun of the same environment",
        )
    seconds = {"mpi": time.perf_counter() - start}
    start = time.perf_counter()
    on_host = communicator.Split_type(MPI.COMM_TYPE_SHARED, key=communicator.Get_rank())
    local_rank, local_size = on_host.Get_rank(), on_host.Get_size()
    on_host.Free()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    seconds["host map"] = time.perf_counter() - start
    device = _device(surroundings, local_rank)
    over_mpi = device.type == "cpu" or surroundings.share_gpus
    if not over_mpi:
        gpu = str(torch.cuda.get_device_properties(device).uuid)
        must_differ(communicator.allgather((surroundings.host, gpu)))
    return World(OverMPI(communicator), surroundings.host, device, communicator, over_mpi, seconds)


def open_process_group(world: World) -> None:
    """Initialise torch.distributed: NCCL on GPUs, MPI on CPUs and shared GPUs; nothing for a single process.

    What the control plane's recorder is told of, that of the MPI backend is told of too.
    Rank 0 opens the store on a port of the kernel's choice and tells it over MPI. Cost: one broadcast of O(log size)
    steps, and O(1) store keys a rank.
    """
    if world.communicator is None or dist.is_initialized():
        return
    start = time.perf_counter()
    # one host: a name that a login node cannot resolve must not matter
    hosts = set(world.control.all_gather(world.host))
    address = "127.0.0.1" if len(hosts) == 1 else world.host
    store = None
    if world.rank == 0:
        store = TCPStore(address, 0, world.size, is_master=True, wait_for_workers=False)
    address, port = world.control.broadcast((address, store.port if store else 0))
    if store is None:
        store = TCPStore(address, port, world.size, is_master=False, wait_for_workers=False)
    world.seconds["store"] = time.perf_counter() - start
    start = time.perf_counter()
    if world.over_mpi:
        from hpcpar.comm import mpi_backend

        mpi_backend.register(observer=world.control.recorder)
        backend = f"{world.device.type}:mpi4py"
    else:
        backend = "nccl"
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)
    world.seconds["process group"] = time.perf_counter() - start


def must_differ(gpus: Sequence[tuple[str, str]]) -> None:
    """Raise UserError, on all ranks alike, where two ranks got the same GPU (host, name): NCCL would only fail."""
    for rank, gpu in enumerate(gpus):
        first = gpus.index(gpu)
        if first < rank:
            raise UserError("launcher", f"ranks {first} and {rank} have the same GPU on {gpu[0]}",
                            "start a rank a GPU and bind it (srun --gpus-per-task=1); HPCPAR_SHARE_GPUS=1 lets ranks "
                            "share one, to try a layout, not for speed; HPCPAR_CPU=1 keeps them on CPU")


def _device(surroundings: Surroundings, local_rank: int) -> torch.device:
    """Choose the GPU by local rank, or the CPU."""
    if not (surroundings.gpus and torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # srun --gpus-per-task shows each task only its own GPU
    index = local_rank % count if surroundings.share_gpus else local_rank if count > 1 else 0
    if index >= count:
        raise UserError("launcher", f"local rank {local_rank} has no GPU of its own: {count} are visible",
                        f"start at most {count} ranks a node, or set HPCPAR_CPU=1")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
