"""Machines as values: what one device computes and holds, and what its links carry.

`machines/*.toml` beside this file are the machines that hpcpar knows; `[machine] gpu` in a job names one, or is the
path of a TOML of the same form (`hpcpar calibrate` writes one):

    base = "a100-80g"            # optional, a known machine: its values hold where this file says nothing
    source = ["where the figures come from"]

    [chip]
    memory_gib = 80.0            # of the device
    reserved_gib = 2.5           # of it, what the driver and the communication library take
    launch_us = 4.0              # from one kernel's end to the next one's start
    gb_per_s = 2039.0            # device memory, datasheet
    gb_efficiency = 0.85         # share of it that a kernel without reuse reaches
    measured_gb_per_s = 1610.0   # a copy, as others measured it; only for comparison; 0: not known
    watts = 400.0                # one device under load, with its share of the node
    cores = 0                    # a CPU: cores that the ranks of a node share; rates here are then those of one core
                                 # while all are busy, memory and watts the node's. 0: a rank has a device of its own

    [peak_tflops]                # dense, by precision: what MFU is measured against
    bf16 = 312.0
    fp16 = 312.0
    fp32 = 19.5
    fp64 = 9.7

    [matmul]
    efficiency = 0.85            # share of the peak that the best products sustain
    units = 108                  # parts that work on one tile each (multiprocessors, cores)
    tile = [256, 128]            # rows and columns of the largest tile; smaller ones are tried as well
    half_depth = 100.0           # inner dim at which a tile reaches half its rate
    alignment = 64               # elements on whose multiples a row must start to be read at full speed; 1: anywhere
    measured = [[8192, 8192, 8192, 250.0]]   # m, n, k, TFLOP/s in 16 bits (fp32 where the machine has no other)

    [attention]                  # a fused kernel that never writes the scores
    forward = 0.60               # shares of the peak at 128 channels a head
    backward = 0.45

    [inside]                     # between devices of one node (or of one NVLink domain)
    devices = 8
    gb_per_s = 300.0             # one device, one direction
    efficiency = 0.80            # share of it that a large collective reaches
    latency_us = 6.0             # a step of a ring
    measured_gb_per_s = 231.6    # as above, of a large all-reduce (bus bandwidth)

    [across]                     # between nodes
    gb_per_s = 25.0              # one device's share of the node's adapters, one direction
    efficiency = 0.80
    latency_us = 12.0

    [host]                       # between a device and its node's memory; may be left out
    gb_per_s = 31.5              # one device, one direction
    efficiency = 0.75            # share of it that pinned copies reach while all devices of the node copy
    share_gib = 128.0            # a device's share of the node's memory; 0: not known, and not checked
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hpcpar.errors import UserError, did_you_mean

KNOWN = Path(__file__).parent / "machines"
ALIGNMENTS = (1, 2, 4, 8, 16, 32, 64)
MAY_BE_0 = frozenset({"reserved_gib", "launch_us", "latency_us", "half_depth", "watts", "cores", "measured_gb_per_s",
                       "share_gib"})


@dataclass(frozen=True)
class Chip:
    """One device: its memory, and what a kernel costs apart from arithmetic."""

    memory_gib: float
    reserved_gib: float
    launch_us: float
    gb_per_s: float
    gb_efficiency: float
    watts: float
    cores: int = 0
    measured_gb_per_s: float = 0.0

    @property
    def usable_bytes(self) -> float:
        """What tensors may take."""
        return (self.memory_gib - self.reserved_gib) * 2**30

    @property
    def bytes_per_s(self) -> float:
        """Memory traffic that a plain kernel sustains."""
        return self.gb_per_s * 1e9 * self.gb_efficiency


@dataclass(frozen=True)
class Peak:
    """Dense peak in TFLOP/s by precision."""

    bf16: float
    fp16: float
    fp32: float
    fp64: float


@dataclass(frozen=True)
class Matmul:
    """How fast matrix products go."""

    efficiency: float
    units: int
    tile: tuple[int, int]
    half_depth: float
    alignment: int = 64
    measured: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class FusedAttention:
    """Shares of the peak that a fused attention kernel reaches at 128 channels a head."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Link:
    """One class of links, seen from one device, in one direction."""

    gb_per_s: float
    efficiency: float
    latency_us: float
    measured_gb_per_s: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """What a large message sustains."""
        return self.gb_per_s * 1e9 * self.efficiency


@dataclass(frozen=True)
class InsideLink(Link):
    """Links inside a node or NVLink domain of `devices`."""

    devices: int = 8


@dataclass(frozen=True)
class Host:
    """A device's link to its node's memory, PCIe 4.0 x16 where nothing is said, and its share of that memory."""

    gb_per_s: float = 31.5
    efficiency: float = 0.75
    share_gib: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """What large copies sustain."""
        return self.gb_per_s * 1e9 * self.efficiency


@dataclass(frozen=True, eq=False)  # compared by identity, because prices are remembered by machine
class Machine:
    """All that the planner knows of a cluster; `name` is the word or path by which it was asked for."""

    name: str
    source: tuple[str, ...]
    chip: Chip
    peak_tflops: Peak
    matmul: Matmul
    attention: FusedAttention
    inside: InsideLink
    across: Link
    host: Host = Host()

    @property
    def is_cpu(self) -> bool:
        """Whether ranks share cores: `cpu`, or what calibrate wrote of some."""
        return self.name == "cpu" or self.chip.cores > 0

    def peak_flops(self, precision: str) -> float:
        """Return the dense peak in FLOP/s."""
        return float(getattr(self.peak_tflops, precision)) * 1e12

    @property
    def peak_16_bits(self) -> float:
        """The larger of both 16-bit peaks, in FLOP/s."""
        return max(self.peak_flops("bf16"), self.peak_flops("fp16"))


def known_machines() -> list[str]:
    """List the machines that hpcpar knows by name."""
    return sorted(path.stem for path in KNOWN.glob("*.toml"))


@cache
def load_machine(name: str) -> Machine:
    """Return a known machine, or read the TOML file at a path. Raises UserError with field, rule and fix."""
    path = Path(name) if name.endswith(".toml") else KNOWN / f"{name}.toml"
    if not path.is_file():
        raise UserError("machine.gpu", f"{name} is no known machine and no file",
                        did_you_mean(name, known_machines()) + " (or the path of a machine TOML)")
    return machine_from_tables(name, _tables(path))


def is_cpu(name: str) -> bool:
    """Whether a job's machine.gpu means cores; a name that nobody knows means none."""
    try:
        return load_machine(name).is_cpu
    except UserError:
        return False


def machine_from_tables(name: str, tables: dict[str, Any]) -> Machine:
    """Build a machine from nested tables, checking every key."""
    hints = typing.get_type_hints(Machine)
    source = tables.pop("source", ())
    if not isinstance(source, list | tuple) or not all(isinstance(line, str) for line in source):
        raise UserError(f"{name}: source", f"is {source!r}, must be a list of texts", 'write source = ["..."]')
    parts: dict[str, Any] = {"name": name, "source": tuple(source)}
    for table, kind in hints.items():
        if table not in parts:
            parts[table] = _part(f"{name}: {table}", kind, tables.pop(table, {}))
    if tables:
        raise UserError(f"{name}: {next(iter(tables))}", "unknown table", did_you_mean(next(iter(tables)), hints))
    return Machine(**parts)


def machine_toml(machine: Machine) -> str:
    """Write a machine in the form that `load_machine` reads."""
    lines = [f"source = {json.dumps(list(machine.source))}"]
    for part in dataclasses.fields(machine)[2:]:
        lines += ["", f"[{part.name}]"]
        values = dataclasses.asdict(getattr(machine, part.name))
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _tables(path: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"is not a machine TOML: {error}", "see hpcpar/planner/hardware.py") from None
    base = tables.pop("base", None)
    if base is None:
        return tables
    if base not in known_machines():
        raise UserError(f"{path}: base", f"{base} is no known machine", did_you_mean(str(base), known_machines()))
    beneath = _tables(KNOWN / f"{base}.toml")
    merged = {**beneath, **tables}
    for key, value in beneath.items():
        if isinstance(value, dict) and isinstance(tables.get(key), dict):
            merged[key] = {**value, **tables[key]}
    return merged


def _part(where: str, kind: Any, table: Any) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if not isinstance(table, dict):
        raise UserError(where, "must be a table", "see hpcpar/planner/hardware.py")
    for key in table:
        if key not in fields:
            raise UserError(f"{where}.{key}", "unknown key", did_you_mean(key, fields))
    for key, field in fields.items():
        if key not in table and field.default is dataclasses.MISSING:
            raise UserError(f"{where}.{key}", "is missing", "see hpcpar/planner/hardware.py")
    hints = typing.get_type_hints(kind)
    return kind(**{key: _number(f"{where}.{key}", hints[key], value) for key, value in table.items()})


def _number(where: str, hint: Any, value: Any) -> Any:
    name = where.rpartition(".")[2]
    if name == "measured":
        if not isinstance(value, list) or not all(isinstance(row, list) and len(row) == 4 for row in value):
            raise UserError(where, f"is {value!r}, must be rows of m, n, k, TFLOP/s", "see hpcpar/planner/hardware.py")
        return tuple(tuple(_number(f"{where} row {i}", float, v) for v in row) for i, row in enumerate(value, 1))
    if name == "tile":
        if not isinstance(value, list) or len(value) != 2:
            raise UserError(where, f"is {value!r}, must be two numbers", "for example tile = [256, 128]")
        return tuple(_number(f"{where} side", int, side) for side in value)
    least = "at least" if name in MAY_BE_0 else "above"
    legal = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) \
        and (value > 0 or (value == 0 and name in MAY_BE_0))
    if not legal:
        raise UserError(where, f"is {value!r}, must be a number {least} 0", "mend that line")
    if hint is int and value != int(value):
        raise UserError(where, f"is {value!r}, must be a whole number", f"for example {round(value)}")
    if name == "alignment" and value not in ALIGNMENTS:
        raise UserError(where, f"is {value!r}, must be a power of 2 up to 64", "64 on GPUs, 1 on CPUs")
    return int(value) if hint is int else float(value)
