"""The floors of the house: an import goes strictly downward; walks the syntax tree of every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpcpar

HOUSE = Path(hpcpar.__file__).parent
FILES = sorted(HOUSE.rglob("*.py"))
FLOORS = {
    "errors": 0, "units": 0, "config": 1, "layout": 2, "planner": 3, "comm": 3, "nn": 3, "data": 3,
    "parallel": 4, "checkpoint": 4, "optim": 4, "train": 5, "submit": 6,
    "cli": 7, "commands": 7, "entry": 7, "doctor": 7, "probe": 7,
}
# rooms above that may not use all that lies beneath them
NARROW = {"submit": {"errors", "units", "config", "layout", "planner"}}
# submit/tasks.py, batch.py, heir.py are doors too: they run on the node, around the command; their job is in SLURM_*
DOORS = {"cli.py", "commands/submit.py", "entry.py", "doctor.py", "probe.py", "submit/tasks.py", "submit/batch.py",
         "submit/heir.py"}
# (file, room imported): why this arrow does not go down. A new line here is a decision: docs/decisions/
EXCEPTIONS = {
    ("entry.py", "cli"): "the same door under its module's name, for launchers",
    ("cli.py", "commands"): "the door and the commands behind it, one module a room",
    ("commands/health.py", "doctor"): "the live checks behind the command, too long to stand inside it",
    ("doctor.py", "probe"): "what is measured on a node, by the doctor and by the prologue of a job",
    ("parallel/zero.py", "optim"): "the ZeRO optimizer owns the shards and calls the update on them",
}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def inside(path: Path) -> str:
    return path.relative_to(HOUSE).as_posix()


def room(path: Path) -> str:
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that is imported anywhere in a file, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # mpi_backend can be taken along with its neighbour: a relative import stays in its room
                assert node.level == 1
                continue
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    names = (name.split(".") for name in imported(parsed(path)))
    return {parts[1] for parts in names if parts[0] == "hpcpar" and len(parts) > 1} - {"__version__"}


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in FILES} - {"__init__", "__main__"} <= set(FLOORS)
    assert len(FILES) > 30


def test_imports_go_strictly_downward_but_for_the_arrows_listed() -> None:
    wrong = set()
    for path in FILES:
        here = room(path)
        for other in rooms_imported(path) - {here}:
            down = here in FLOORS and other in FLOORS and FLOORS[other] < FLOORS[here]
            if not down or other not in NARROW.get(here, FLOORS):
                wrong.add((inside(path), other))
    assert wrong == set(EXCEPTIONS)


@pytest.mark.parametrize("path", FILES, ids=inside)
def test_only_the_door_reads_the_environment(path: Path) -> None:
    reads = {"environ", "environb", "getenv", "getenvb"}
    found = [node.lineno for node in ast.walk(parsed(path)) if isinstance(node, ast.Attribute) and node.attr in reads]
    found += [1 for name in imported(parsed(path)) if name.startswith("os.") and name.split(".")[1] in reads]
    assert not found or inside(path) in DOORS, found


@pytest.mark.parametrize("path", FILES, ids=inside)
def test_nothing_is_unpickled(path: Path) -> None:
    tree = parsed(path)
    barred = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not {name for name in imported(tree) if name.split(".")[0] in barred or name == "torch.load"}
    loads = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "load"
             and isinstance(node.value, ast.Name) and node.value.id in ("torch", "np", "numpy")]
    assert not loads, loads


MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MAKERS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict"}


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        called = value.func
        return (called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")) in MAKERS
    return isinstance(value, MUTABLE)


@pytest.mark.parametrize("path", FILES, ids=inside)
def test_no_global_that_changes(path: Path) -> None:
    tree = parsed(path)
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Global)]
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            name = ast.unparse(target)
            constant = name.isupper() or (name.startswith("__") and name.endswith("__"))
            assert constant or not is_mutable(node.value), f"{name}, line {node.lineno}"


@pytest.mark.parametrize(("folder", "barred"), [
    ("config", "torch mpi4py numpy h5py"),
    ("layout", "torch mpi4py h5py"),
    ("planner", "torch mpi4py h5py matplotlib"),
    ("checkpoint", "torch mpi4py"),
    ("submit", "torch mpi4py"),
])
def test_these_rooms_do_without_torch(folder: str, barred: str) -> None:
    exempt = {"checkpoint.exchange", "checkpoint.dcp"}  # Hugging Face; torch.distributed.checkpoint
    names = [f"{folder}.{path.stem}" for path in sorted((HOUSE / folder).glob("*.py")) if path.stem != "__init__"]
    imports = "; ".join(f"import hpcpar.{name}" for name in names if name not in exempt)
    code = f"import sys; {imports}; print([m for m in {barred.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
