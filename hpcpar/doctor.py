"""`hpcpar doctor`: what this machine has, and under mpirun or srun what lies between the ranks; a failure says the fix.

Nothing here is needed by a run; a check that cannot be made (no Slurm on a laptop) says so and is no failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from hpcpar import __version__, probe
from hpcpar.config.surroundings import Surroundings
from hpcpar.submit.health import Wanted, judge
from hpcpar.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from hpcpar.comm.control import Control

ALL_REDUCE_LIMIT_S = 10.0
_SIZES = (8, 1 << 20, 16 << 20)  # bytes


class Finding(NamedTuple):
    """One line: what was looked at, what was found, and the fix if that is no good."""

    what: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        mark = "FAIL" if self.fix else "ok"
        return f"{mark:<5} {self.what:<12} {self.found}" + (f"\n      {'':<12} fix: {self.fix}" if self.fix else "")


def examine(surroundings: Surroundings, nodes: bool = False) -> int:
    """Print the findings (on rank 0), and return 0, or 3 if something is wrong.

    `nodes`: only measure every rank's host and hold it against the others; a prologue of some 10 s.
    """
    bad = 0
    if surroundings.rank == 0 and not nodes:
        for check in (_python, _torch, _mpi, _hdf5, _gpus, _slurm, _network, _room):
            for finding in _safely(check, surroundings):
                bad += bool(finding.fix)
                print(finding, flush=True)
    if surroundings.launcher:
        for finding in _nodes(surroundings) if nodes else _ranks(surroundings):
            bad += bool(finding.fix)
            if surroundings.rank == 0:
                print(finding, flush=True)
    elif surroundings.rank == 0:
        print(Finding("ranks", "one process; for the ranks: mpirun -n 8 hpcpar doctor, srun --mpi=pmi2 hpcpar doctor"))
    return 3 if bad else 0


def _safely(check: Callable[[Surroundings], Iterator[Finding]], surroundings: Surroundings) -> list[Finding]:
    try:
        return list(check(surroundings))
    except Exception as error:  # a doctor who dies of the illness is no help
        name = check.__name__.lstrip("_")
        return [Finding(name, f"cannot be looked at: {type(error).__name__}: {error}", f"mend the {name} installation")]


def _python(surroundings: Surroundings) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    fix = "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer"
    yield Finding("python", f"{version} at {sys.executable} on {surroundings.host}, hpcpar {__version__}", fix)


def _torch(surroundings: Surroundings) -> Iterator[Finding]:
    import torch

    cuda = "no CUDA, no NCCL"
    if torch.version.cuda:
        cuda = f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    numbers = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    yield Finding("torch", f"{torch.__version__}, {cuda}",
                  "" if numbers >= (2, 11) else "pip install 'torch>=2.11'")


def _mpi(surroundings: Surroundings) -> Iterator[Finding]:
    # asked in a process of its own: importing mpi4py's MPI would start MPI here, as a single rank
    code = ("from mpi4py import MPI; name, version = MPI.get_vendor(); "
            "print(name, *version, sep='.'); print(MPI.Get_library_version().split(chr(10))[0][:60])")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI_", "SLURM_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=clean,
                          check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        yield Finding("mpi", f"mpi4py finds no MPI library: {last}",
                      "pip install mpi4py mpich, or load your cluster's MPI module before starting Python")
        return
    vendor, library = done.stdout.splitlines()[:2]
    yield Finding("mpi", f"{vendor} ({library})")
    launcher = shutil.which("mpirun")
    if launcher is None:
        yield Finding("launcher", "no mpirun on PATH", "" if shutil.which("srun") else "pip install mpich, or use srun")
        return
    told = subprocess.run([launcher, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    theirs = "Open MPI" if "open" in told.lower() else "MPICH" if "hydra" in told.lower() else "Intel MPI"
    same = theirs.split()[0].lower() in vendor.lower()
    yield Finding("launcher", f"{launcher} ({theirs})", "" if same else
                  f"mpirun is {theirs}'s, but mpi4py uses {vendor}: every rank would be alone; put the matching mpirun "
                  "first on PATH")


def _hdf5(surroundings: Surroundings) -> Iterator[Finding]:
    import h5py

    yield Finding("hdf5", f"h5py {h5py.version.version}, HDF5 {h5py.version.hdf5_version}")


def _gpus(surroundings: Surroundings) -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Finding("gpus", f"{len(names)}: {', '.join(sorted(set(names)))}"
                      + ("" if surroundings.gpus else " (HPCPAR_CPU=1: not used)"))
    elif Path("/dev/nvidia0").exists():
        yield Finding("gpus", "a driver is there, but torch cannot use it",
                      "install a torch build for this driver's CUDA (nvidia-smi says which)")
    else:
        yield Finding("gpus", "none: ranks run on CPU cores and talk through MPI")


def _slurm(surroundings: Surroundings) -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield Finding("slurm", "not installed here (hpcpar submit --executor local works)")
        return
    done = subprocess.run(["sinfo", "-h", "-o", "%P %D %T"], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        yield Finding("slurm", f"sinfo fails: {done.stderr.splitlines()[0][:90]}",
                      "is slurmctld up (scontrol ping)? Only hpcpar submit needs it")
        return
    yield Finding("slurm", "; ".join(done.stdout.split("\n")[:4]).strip("; ") or "no partition")


def _network(surroundings: Surroundings) -> Iterator[Finding]:
    cards = []
    for card in sorted(Path("/sys/class/net").glob("*")):
        try:
            speed = int((card / "speed").read_text())
        except (OSError, ValueError):
            speed = -1
        state = (card / "operstate").read_text().strip() if (card / "operstate").exists() else "?"
        if card.name != "lo" and state != "down":
            cards.append(card.name + (f" {speed / 1000:g} Gbit/s" if speed > 0 else f" {state}"))
    fabric = [path.name for path in sorted(Path("/sys/class/infiniband").glob("*"))]
    yield Finding("network", ", ".join(cards + fabric) or "loopback only")


def _room(surroundings: Surroundings) -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    disk = shutil.disk_usage(Path.cwd()).free
    yield Finding("room", f"{format_bytes(memory)} of memory, {format_bytes(disk)} free on {Path.cwd()}",
                  "" if disk > 1 << 30 else "less than 1 GiB is free: choose a --run folder elsewhere")
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").exists() else 0
    if shared < 64 << 20:
        yield Finding("/dev/shm", f"{format_bytes(shared)}",
                      "MPI's shared memory needs 64 MiB or more: in a container, --shm-size=1g")


def _ranks(surroundings: Surroundings) -> Iterator[Finding]:
    """Find the other ranks, and see whether they can sum. Every rank must iterate to the end."""
    from hpcpar.comm.bootstrap import close_process_group, connect, open_process_group

    start = time.perf_counter()
    world = connect(surroundings)
    hosts: dict[str, list[int]] = {}
    for rank, (host, device) in enumerate(world.control.all_gather((world.host, str(world.device)))):
        hosts.setdefault(f"{host} ({device.partition(':')[0]})", []).append(rank)
    table = "; ".join(f"{host}: {_runs(ranks)}" for host, ranks in hosts.items())
    yield Finding("ranks", f"{world.size} under {surroundings.launcher}, {format_seconds(time.perf_counter() - start)} "
                  f"to find one another; {table}")
    clocks = world.control.all_gather(time.time())
    apart = max(clocks) - min(clocks)
    yield Finding("clocks", f"at most {format_seconds(apart)} apart",
                  "" if apart < 1 else "run chrony or ntpd on all nodes: who died first is told by the clock")

    def give_up() -> None:
        print(Finding("all-reduce", f"rank {world.rank}: not through in {ALL_REDUCE_LIMIT_S:g} s",
                      "ranks see each other but data does not flow: check the network interfaces above, firewalls "
                      "between nodes, NCCL_SOCKET_IFNAME or UCX_NET_DEVICES"), flush=True)
        world.abort(3)

    watchdog = threading.Timer(ALL_REDUCE_LIMIT_S, give_up)
    watchdog.daemon = True
    watchdog.start()
    open_process_group(world)
    yield _sum_up(world.device.type, world.size)
    yield _slowest_link(world.control, probe.measure_links(world.communicator, list(map(str, range(world.size)))))
    watchdog.cancel()
    close_process_group()
    world.control.barrier()


def _nodes(surroundings: Surroundings) -> Iterator[Finding]:
    """Look at every host as the prologue of a job does, and name the bad ones. Every rank must iterate to the end."""
    from hpcpar.comm.bootstrap import connect

    world = connect(surroundings)
    report: dict[str, Any] = {**probe.measure(surroundings.gpus)}
    world.control.barrier()
    report["clock"] = time.time()
    report["links"] = probe.measure_links(world.communicator, world.control.all_gather(world.host))
    # of several ranks on a host the first one speaks for it
    found = judge(dict(reversed(world.control.all_gather((world.host, report)))), Wanted())
    for line in found.lines:
        yield Finding(*line.split(": ", 1))
    for host, reason in found.bad.items():
        yield Finding("host", f"{host}: {reason}", f"leave it out: --exclude={host}")
    world.control.barrier()


def _sum_up(device: str, size: int) -> Finding:
    import torch
    import torch.distributed as dist

    if size == 1:
        return Finding("all-reduce", "one rank: nothing to sum")
    told = []
    for num_bytes in _SIZES:
        x = torch.ones(num_bytes // 4, device=device)
        dist.all_reduce(x)  # the first opens connections
        wrong = not bool((x == size).all())
        start = time.perf_counter()
        dist.all_reduce(torch.ones_like(x))
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        told.append(f"{format_bytes(num_bytes)} in {seconds * 1e6:.0f} us")
        if wrong:
            return Finding("all-reduce", f"the sum of {format_bytes(num_bytes)} is wrong",
                           "MPI or NCCL is broken here: try the other MPI, NCCL_P2P_DISABLE=1, or another node")
    rate = 2 * (size - 1) / size * _SIZES[-1] / seconds
    return Finding("all-reduce", f"{', '.join(told)} ({format_bytes(rate)}/s a rank)")


def _slowest_link(control: Control, mine: Mapping[str, float]) -> Finding:
    """Find the slowest of the links between ranks that are neighbours in a ring. Every rank must call."""
    links = [(rate, rank, int(other)) for rank, found in enumerate(control.all_gather(mine))
             for other, rate in found.items()]
    if not links:
        return Finding("links", "one rank: no link")
    rate, *pair = min(links)
    return Finding("links", f"median {median(link[0] for link in links):.3g} GB/s between neighbours over MPI, least "
                   f"{rate:.3g} between ranks {min(pair)} and {max(pair)}")


def _runs(ranks: list[int]) -> str:
    if ranks == list(range(ranks[0], ranks[0] + len(ranks))) and len(ranks) > 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
