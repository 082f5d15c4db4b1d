"""`pytest tests` runs the tests of one process, `mpirun -n 8 python -m pytest tests` those marked mpi.

Under mpirun every rank runs the same tests. After each phase the ranks agree on its outcome, a watchdog ends the job
when one of them does not arrive, and rank 0 alone reports.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# mpi4py starts MPI when imported and costs a plain run time, so the launcher's own variables tell how many we are.
NUM_RANKS = int(os.environ.get("PMI_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE") or 1)
TIMEOUT_S = float(os.environ.get("MPI_TEST_TIMEOUT_S", "60"))


@pytest.hookimpl(trylast=True)  # after the terminal reporter is there to be silenced
def pytest_configure(config: pytest.Config) -> None:
    if NUM_RANKS > 1:
        config.pluginmanager.register(AgreeingRanks(config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = [item for item in items if (item.get_closest_marker("mpi") is not None) == (NUM_RANKS > 1)]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """On several ranks, read only files with tests for them: to import all, eight times, takes a minute."""
    others = NUM_RANKS > 1 and collection_path.name.startswith("test_")
    return True if others and "mark.mpi" not in collection_path.read_text(encoding="utf-8") else None


class AgreeingRanks:
    """The hooks of a run on several ranks."""

    def __init__(self, config: pytest.Config):
        from mpi4py import MPI

        self.comm = MPI.COMM_WORLD
        if self.comm.rank:
            config.pluginmanager.unregister(name="terminalreporter")

    def abort(self, why: str, code: int) -> None:
        print(f"[rank {self.comm.rank}] {why}: aborting the job", file=sys.__stderr__, flush=True)
        self.comm.Abort(code)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        names = self.comm.allgather([item.nodeid for item in session.items])
        if any(other != names[0] for other in names):
            self.abort("ranks collected different tests", 3)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        faulthandler.dump_traceback_later(TIMEOUT_S * 1.5, exit=True)  # all ranks stuck: each says where
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[Any]:
        report = yield
        mine = (report.outcome, f"[rank {self.comm.rank}] {report.longreprtext}" if report.failed else "")
        # the others may be stuck because this rank failed: then its message is all there is to see, and sooner
        limit_s = TIMEOUT_S / 2 if report.failed else TIMEOUT_S
        why = f"{item.nodeid} {call.when} {mine}: the others did not arrive"
        watchdog = threading.Timer(limit_s, self.abort, (why, 4))
        watchdog.daemon = True
        watchdog.start()
        everyone = self.comm.allgather(mine)
        watchdog.cancel()
        outcomes = [outcome for outcome, _ in everyone]
        if "failed" in outcomes or len(set(outcomes)) > 1:
            said = "\n".join(text for outcome, text in everyone if outcome == "failed")
            report.outcome, report.longrepr = "failed", said[:20000] or f"ranks disagree: {outcomes}"
        return report


@pytest.fixture(scope="session")
def world() -> Iterator[SimpleNamespace]:
    """The world as the trainer opens it, with `comm` (mpi4py's) and `store` (torch's) for tests of the wires."""
    import torch
    import torch.distributed as dist

    from hpcpar.comm.bootstrap import connect, open_process_group
    from hpcpar.comm.recorder import Recorder
    from hpcpar.config.surroundings import Surroundings

    found = connect(Surroundings.read(os.environ))
    found.control.recorder = Recorder()
    torch.set_num_threads(1)
    open_process_group(found)
    store = dist.distributed_c10d._get_default_store()
    yield SimpleNamespace(**vars(found), rank=found.rank, size=found.size, comm=found.communicator, store=store)
    dist.destroy_process_group()
    found.control.barrier()  # rank 0 serves the store until the last rank is done with it


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks of one host share no memory, as if each had a host of its own: ZeRO 3 gathers weights."""
    from hpcpar.comm.mpi_backend import MPIProcessGroup

    monkeypatch.setattr(MPIProcessGroup, "shared", lambda *_: None)
    monkeypatch.setattr(MPIProcessGroup, "lend", lambda *_: None)
