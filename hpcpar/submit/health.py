"""Which nodes are fit to train on: the reports of `probe`, held against the machine of the job and the other nodes.

A rate is bad below a share of what the profile's machine gives, or of the median of all nodes where that is less: if
all are slower than the profile says, it is the profile that is wrong, and nobody is left out for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

from hpcpar.planner.hardware import Machine

LIMIT_S = 50
"""How long the prologue may take; a node that has left no report by then is bad."""
CLOCK_S = 1.0
"""How far a node's clock may be from the others': who died first is told by the clock."""
_ROOM_GIB = 1.0
_MEMORY_SHARE, _FREE_SHARE = 0.9, 0.9  # of a GPU's memory: as large as the profile says, and no other process on it
_LINK_SHARE = 0.5
# what is compared: its unit, and the least share of the reference; a core's rate depends on what else the node does
_RATES = MappingProxyType({"matmul": ("TFLOP/s", 0.5), "disk": ("MB/s written", 0.1), "memory": ("GiB free", 0.5)})
_GPU_SHARE = 0.8


class Wanted(NamedTuple):
    """What a job and its machine's profile promise of a node."""

    gpus: int = 0
    machine: Machine | None = None  # None: nodes are compared with one another only


class Health(NamedTuple):
    """What the prologue found: lines to print, and each bad node with the reason."""

    lines: tuple[str, ...]
    bad: dict[str, str]


def read_reports(folder: Path, nodes: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """Return each node's report, None where it has left none."""
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(nodes)
    for node in nodes:
        try:
            found[node] = json.loads((folder / f"{node}.json").read_text())
        except (OSError, ValueError):
            continue
    return found


def judge(reports: Mapping[str, Mapping[str, Any] | None], wanted: Wanted) -> Health:
    """Say which nodes are bad, and why."""
    heard = {node: report for node, report in reports.items() if report is not None}
    if not heard:  # srun or the shared file system, not the nodes
        return Health(("no node has left a report: the prologue is passed over",), {})
    bad = dict.fromkeys((node for node in reports if node not in heard), f"left no report in {LIMIT_S} s")
    # what one of them has all should have, whatever was promised
    wanted = wanted._replace(gpus=max(wanted.gpus, *(int(report.get("devices", 0)) for report in heard.values())))
    lines: list[str] = []
    for node, report in heard.items():
        if reason := _by_itself(report, wanted):
            bad[node] = reason
    for what in _RATES:
        line, slow = _compare(what, {node: report[what] for node, report in heard.items() if what in report}, wanted)
        lines += [line] if line else []
        bad = slow | bad
    for line, guilty in (_clocks(heard), _links(heard, wanted)):
        lines += [line] if line else []
        bad = guilty | bad
    if not bad and any("clock" not in report for report in heard.values()):
        lines.append("clocks and links are not known: MPI did not come up between the nodes")
    return Health(tuple(lines), bad)


def _by_itself(report: Mapping[str, Any], wanted: Wanted) -> str:
    """Return what is wrong with a node whatever the others are, or nothing."""
    if "error" in report:
        return str(report["error"])
    if report["devices"] < wanted.gpus:
        return f"{report['devices']:.0f} of {wanted.gpus} GPUs are there"
    if report["room"] < _ROOM_GIB:
        return f"{report['room']:.2f} GiB are free on its own disk (TMPDIR)"
    if wanted.gpus and wanted.machine and "device_memory" in report:
        least = _MEMORY_SHARE * wanted.machine.chip.memory_gib
        if report["device_memory"] < least:
            return f"a GPU has {report['device_memory']:.1f} GiB, {wanted.machine.name} has more than {least:.1f}"
        if report["device_free"] < _FREE_SHARE:
            return f"another process holds {1 - report['device_free']:.0%} of a GPU's memory"
    return ""


def _compare(what: str, values: Mapping[str, float], wanted: Wanted) -> tuple[str, dict[str, str]]:
    """Return a line on one rate of all nodes, and who falls behind."""
    if not values:
        return "", {}
    unit, share = _RATES[what]
    usual, slowest = median(values.values()), min(values, key=lambda node: values[node])
    promised = _promised(what, wanted)
    share = _GPU_SHARE if what == "matmul" and wanted.gpus else share
    reference = min(usual, promised)
    said = f"{what}: median {usual:.3g} {unit}, least {values[slowest]:.3g} on {slowest}"
    if promised < math.inf:
        said += f", {wanted.machine.name if wanted.machine else ''} gives {promised:.3g}"
        if usual < share * promised:
            said += "; all nodes are slower than the profile says: mend machine.gpu, or ask what slows them"
    return said, {node: f"{what} {value:.3g} {unit}, {reference:.3g} is usual" for node, value in values.items()
                  if value < share * reference}


def _promised(what: str, wanted: Wanted) -> float:
    if what != "matmul" or wanted.machine is None:
        return math.inf
    return wanted.machine.matmul.efficiency * wanted.machine.peak_tflops.fp16


def _clocks(heard: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, str]]:
    """Compare the clocks, all read just after the same barrier."""
    clocks = {node: report["clock"] for node, report in heard.items() if "clock" in report}
    if len(clocks) < 2:
        return "", {}
    apart, usual = max(clocks.values()) - min(clocks.values()), median(clocks.values())
    line = f"clocks: at most {apart:.3g} s apart"
    if apart <= CLOCK_S:
        return line, {}
    if len(clocks) == 2:
        return f"{line}, and two nodes cannot tell whose is wrong: run chrony or ntpd on {' and '.join(clocks)}", {}
    return line, {node: f"its clock is {clock - usual:+.1f} s off" for node, clock in clocks.items()
                  if abs(clock - usual) > CLOCK_S}


def _links(heard: Mapping[str, Mapping[str, Any]], wanted: Wanted) -> tuple[str, dict[str, str]]:
    """Compare the links between neighbours: a node all of whose links are slow is bad, not the ones it talked to."""
    links = {node: report["links"] for node, report in heard.items() if report.get("links")}
    rates = [rate for of in links.values() for rate in of.values()]
    if not rates:
        return "", {}
    usual = median(rates)
    promised = wanted.machine.across.bytes_per_s / 1e9 if wanted.machine and wanted.gpus else math.inf
    limit = _LINK_SHARE * min(usual, promised)
    slowest, rate = min(((node, min(of.values())) for node, of in links.items()), key=lambda pair: pair[1])
    line = f"links: median {usual:.3g} GB/s over MPI, least {rate:.3g} at {slowest}"
    return line, {node: f"its links give {', '.join(f'{rate:.3g} GB/s to {other}' for other, rate in of.items())}; "
                        f"{usual:.3g} is usual" for node, of in links.items()
                  if len(of) > 1 and max(of.values()) < limit}
