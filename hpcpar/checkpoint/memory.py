"""The newest set once more in the nodes' memory, so that a restart after a lost rank or node need not touch the disk.

    node 0   /dev/shm/hpcpar-.../node0/step-00000100/   files of its own ranks   files of node 2's   manifest.json
    node 1   /dev/shm/hpcpar-.../node1/step-00000100/   files of its own ranks   files of node 0's   manifest.json
    node 2   /dev/shm/hpcpar-.../node2/step-00000100/   files of its own ranks   files of node 1's   manifest.json

The files are those of a set on disk, one a rank, without model.h5; a manifest there says that every node had all of its
files. They outlive the ranks, lie under the run's id, and go when the run ends well. At a restart the ranks tell each
other who has what, send what a host lacks, and check it as they check a set on disk.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hpcpar.checkpoint.format import MANIFEST, RUN_ID, FileEntry, Manifest, set_name, step_of
from hpcpar.checkpoint.load import names_needed
from hpcpar.checkpoint.publish import begin, publish
from hpcpar.checkpoint.save import together
from hpcpar.checkpoint.tasks import Worker
from hpcpar.checkpoint.verify import find_damage, named_sets, published_sets
from hpcpar.comm.control import Control
from hpcpar.errors import CheckpointError, UserError
from hpcpar.layout.layout import Layout
from hpcpar.units import format_bytes

SHARED = Path("/dev/shm")


@dataclass(frozen=True)
class Memory:
    """Where a run keeps its newest set in memory: `folder` on every host, `hosts` of all ranks."""

    folder: Path
    hosts: tuple[str, ...]
    rank: int

    @property
    def home(self) -> Path:
        """The folder of this rank's host. Named after it, so that several can be played on one machine."""
        return self.folder / self.hosts[self.rank]

    @property
    def is_first(self) -> bool:
        """Whether this rank does what a host does once."""
        return self.hosts.index(self.hosts[self.rank]) == self.rank

    def neighbour(self, rank: int) -> int | None:
        """Return the rank on the next host that keeps a copy of a rank's file; None where there is one host."""
        names = list(dict.fromkeys(self.hosts))
        if len(names) == 1:
            return None
        host = self.hosts[rank]
        there = self.ranks_on(names[(names.index(host) + 1) % len(names)])
        return there[self.ranks_on(host).index(rank) % len(there)]

    def ranks_on(self, host: str) -> list[int]:
        """List the ranks of a host."""
        return [rank for rank, name in enumerate(self.hosts) if name == host]


class _Parcel(NamedTuple):
    """A file on its way from one rank's host to another's."""

    file: str
    size: int
    source: int
    target: int


def open_memory(checkpoints: Path, control: Control, host: str, shared: Path = SHARED) -> Memory:
    """Return this run's place in memory, and delete what another run in the same folder left. Every rank must call.

    Raises: CheckpointError, the same on all ranks.
    """
    hosts = tuple(control.all_gather(host))
    known = together(control, "copies in memory", lambda: _run_id(checkpoints) if control.rank == 0 else "")[0]
    memory = Memory(shared / f"{_place_of(checkpoints)}-{known}", hosts, control.rank)

    def prepare() -> None:
        if memory.is_first:
            unfinished = memory.home.glob(".step-*.tmp")
            others = [path for path in shared.glob(f"{_place_of(checkpoints)}-*") if path != memory.folder]
            for left in (*unfinished, *others):
                shutil.rmtree(left, ignore_errors=True)
        memory.folder.mkdir(mode=0o700, exist_ok=True)
        memory.home.mkdir(exist_ok=True)

    together(control, "copies in memory", prepare)
    return memory


def disown(checkpoints: Path, shared: Path = SHARED) -> None:
    """Delete a run's copies on this host, and let none be found again: the run goes on without them."""
    (checkpoints / RUN_ID).unlink(missing_ok=True)
    for left in shared.glob(f"{_place_of(checkpoints)}-*"):
        shutil.rmtree(left, ignore_errors=True)


def check_room(memory: Memory, control: Control, num_bytes: int) -> None:
    """Refuse where a host lacks memory for two sets of copies (one stays until the next is whole). All ranks must call.

    `num_bytes` are this rank's. Raises: UserError on all ranks.
    """
    everyones = control.all_gather(num_bytes)
    kept_by = [memory.neighbour(rank) for rank in range(len(everyones))]
    here = set(memory.ranks_on(memory.hosts[memory.rank]))
    wanted = 2 * sum(own * ((rank in here) + (kept_by[rank] in here)) for rank, own in enumerate(everyones))
    there = sum(file.stat().st_size for file in memory.home.rglob("*") if file.is_file())
    disk = os.statvfs(memory.folder)
    free = disk.f_bavail * disk.f_frsize + there
    short = f"{memory.hosts[memory.rank]} needs {format_bytes(wanted)} and has {format_bytes(free)}"
    lacking = [why for why in control.all_gather(short if free < wanted else "") if why]
    if lacking:
        raise UserError("checkpoint.asynchronous", f"neighbour needs memory in {memory.folder.parent} for two sets of "
                        f"copies: {lacking[0]}", "write asynchronous = true, or make that file system larger")


def remember(memory: Memory, step: int, state: Mapping[str, Any], control: Control, worker: Worker) -> Iterator[None]:
    """Keep the step's set in memory, then forget older ones; pauses like `save_phases`, and every rank must go on.

    Raises: CheckpointError, the same on all ranks; what was in memory before stays.
    Cost: own bytes written to memory and hashed once (by the worker), sent once and received once.
    """
    final, name = memory.home / set_name(step), f"{set_name(step)} in memory"
    folder = final.with_name(f".{final.name}.tmp")
    try:
        together(control, name, lambda: begin(final) if memory.is_first else None)
        worker.ask("write", folder=str(folder), turn=0, step=step, index=False)
        yield None
        answers = together(control, name, worker.answer)
        entries = [(rank, FileEntry(**entry)) for rank, answer in enumerate(answers) for entry in answer["entries"]]
        parcels = [_Parcel(entry.name, entry.size, rank, target) for rank, entry in entries
                   if (target := memory.neighbour(rank)) is not None]
        _deliver(control, name, parcels, folder)
        if control.rank == 0:
            worker.ask("complete", folder=str(folder), step=step, kinds=[answer["kinds"] for answer in answers],
                       state=dict(state), entries=[entry for answer in answers for entry in answer["entries"]])
        yield None

        def listed() -> bytes:
            worker.answer()
            return (folder / MANIFEST).read_bytes()

        raw = together(control, name, lambda: listed() if control.rank == 0 else b"")[0]

        def appear() -> None:
            (folder / MANIFEST).write_bytes(raw)
            publish(folder, final)
            for older in named_sets(memory.home):
                if older != final:
                    shutil.rmtree(older)

        together(control, name, lambda: appear() if memory.is_first else None)
    except CheckpointError:
        if memory.is_first:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def recall(memory: Memory, layout: Layout, control: Control, oldest: int, note: Callable[[str], None]) -> Path | None:
    """Return the newest set in memory, whole and verified, with all files on this host that its ranks read; or None.

    Sets before step `oldest` do not count. `note` is told of a set that cannot be used. Every rank must call.
    Cost: reads the sets' files in memory, and sends to each host what it lacks.
    """
    here = {step: {file.name: file.stat().st_size for file in path.iterdir()} for path in published_sets(memory.home)
            if (step := step_of(path.name)) is not None} if memory.is_first else {}
    everywhere: list[dict[int, dict[str, int]]] = control.all_gather(here)
    for step in sorted({step for found in everywhere for step in found if step >= oldest}, reverse=True):
        try:
            _bring(memory, layout, control, step, [found.get(step, {}) for found in everywhere])
            return memory.home / set_name(step)
        except CheckpointError as error:
            note(f"the copy in memory of {set_name(step)} cannot be used: {error}")
    return None


def forget(memory: Memory) -> None:
    """Delete this run's copies on this host: the disk has all that counts."""
    if memory.is_first:
        shutil.rmtree(memory.home, ignore_errors=True)
        if not any(memory.folder.iterdir()):
            memory.folder.rmdir()


def _place_of(checkpoints: Path) -> str:
    """Return what the names of all copies of runs in a folder begin with."""
    return f"hpcpar-{os.getuid()}-{hashlib.sha256(str(checkpoints.resolve()).encode()).hexdigest()[:12]}"


def _run_id(checkpoints: Path) -> str:
    """Return the id of the run in a folder; a new one for a run that has none."""
    file = checkpoints / RUN_ID
    if not file.exists():
        checkpoints.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(8))
    return file.read_text()


def _bring(memory: Memory, layout: Layout, control: Control, step: int, there: Sequence[Mapping[str, int]]) -> None:
    """Bring every host what its ranks read of a set, and verify it. `there`: by rank, files and sizes on its host."""
    folder, name = memory.home / set_name(step), f"{set_name(step)} in memory"
    holder = next(rank for rank, files in enumerate(there) if files)
    raw = together(control, name, lambda: (folder / MANIFEST).read_bytes() if control.rank == holder else b"",
                   "read")[holder]
    manifest = Manifest.from_bytes(raw, name)
    holders = {entry.name: [rank for rank, files in enumerate(there) if files.get(entry.name) == entry.size]
               for entry in manifest.files}
    lost = [file for file, ranks in holders.items() if not ranks]
    if lost:
        raise CheckpointError(f"{len(lost)} of its {len(holders)} files are on no host that is left, {lost[0]} first")
    needed = names_needed(manifest, layout, control.rank, control.size)
    own = {file for file, ranks in holders.items() if memory.hosts.index(memory.hosts[memory.rank]) in ranks}
    _deliver(control, name, _parcels(memory, manifest, holders, control.all_gather(sorted(needed - own))), folder)

    def check() -> None:
        if memory.is_first:
            (folder / MANIFEST).write_bytes(raw)
        bad = find_damage(folder, manifest, needed)
        if bad:
            raise CheckpointError("; ".join(map(str, bad)))

    together(control, name, check, "read")


def _parcels(memory: Memory, manifest: Manifest, holders: Mapping[str, Sequence[int]],
             lacking: Sequence[Sequence[str]]) -> list[_Parcel]:
    """List what is sent: a file once to each host, the senders of a host by turns. `lacking`: by rank."""
    sizes = {entry.name: entry.size for entry in manifest.files}
    found: dict[tuple[str, str], _Parcel] = {}
    for target, files in enumerate(lacking):
        for file in files:
            senders = memory.ranks_on(memory.hosts[holders[file][0]])
            parcel = _Parcel(file, sizes[file], senders[len(found) % len(senders)], target)
            found.setdefault((memory.hosts[target], file), parcel)
    return list(found.values())


def _deliver(control: Control, name: str, parcels: Sequence[_Parcel], folder: Path) -> None:
    """Send files from the sources' `folder` to the targets', from memory to memory. Every rank must call, alike."""
    outgoing: list[tuple[int, memoryview]] = []
    incoming: list[tuple[int, memoryview]] = []

    def part(parcel: _Parcel) -> Path:
        return folder / f".{parcel.file}.part"

    def unfold() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for parcel in parcels:
            if parcel.source == control.rank:
                with (folder / parcel.file).open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), parcel.size, prot=mmap.PROT_READ)
                    outgoing.append((parcel.target, memoryview(mapped)))
            if parcel.target == control.rank:
                with part(parcel).open("w+b") as file:
                    os.posix_fallocate(file.fileno(), 0, parcel.size)  # a lack of memory would kill the rank below
                    incoming.append((parcel.source, memoryview(mmap.mmap(file.fileno(), parcel.size))))

    together(control, name, unfold)
    if parcels:
        control.exchange(outgoing, incoming)
    for parcel in parcels:
        if parcel.target == control.rank:
            part(parcel).rename(folder / parcel.file)
    control.barrier()
