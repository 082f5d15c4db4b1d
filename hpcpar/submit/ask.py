"""What Slurm's own commands answer, as values; None where there is no Slurm or it does not answer."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

TIMEOUT_S = 30.0
LOST = ("DOWN", "DRAIN", "FAIL", "NOT_RESPONDING", "UNKNOWN", "POWERED_DOWN")
"""Words in a node's state that mean: it cannot run tasks."""


def slurm(*words: str) -> str | None:
    """Run one of Slurm's commands and return what it prints, or None where it is missing, refuses or hangs."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def fields(line: str) -> dict[str, str]:
    """Read one line of `scontrol -o show`: NAME=VALUE separated by blanks."""
    return {name: value for name, _, value in (word.partition("=") for word in line.split())}


@dataclass(frozen=True)
class Node:
    """One node, as a request sees it."""

    name: str
    cpus: int
    gpus: int
    features: frozenset[str]
    usable: bool


@dataclass(frozen=True)
class Partition:
    """What a partition gives; None = no limit."""

    name: str
    max_minutes: int | None
    max_nodes: int | None
    nodes: tuple[Node, ...]  # empty where Slurm hides some: clouds show no node that is powered down


def partitions() -> dict[str, dict[str, str]] | None:
    """Return every partition's fields as `scontrol show partition` names them."""
    answer = slurm("scontrol", "-o", "show", "partition")
    return None if answer is None else {f["PartitionName"]: f for f in map(fields, answer.splitlines())}


def partition(found: dict[str, str]) -> Partition | None:
    """Return what the partition with these fields gives, its nodes included."""
    answer = slurm("sinfo", "-h", "-N", "-p", found["PartitionName"], "-o", "%N|%c|%G|%f|%T")
    if answer is None:
        return None
    rows = [line.split("|") for line in answer.splitlines()]
    nodes = tuple(Node(name, int(cpus.rstrip("+")), _gpus(gres), frozenset(features.split(",")), _usable(state))
                  for name, cpus, gres, features, state in rows)
    if len({node.name for node in nodes}) < int(found.get("TotalNodes", 0)):
        nodes = ()
    limit = found.get("MaxNodes", "")
    return Partition(found["PartitionName"], minutes(found.get("MaxTime", "")), int(limit) if limit.isdigit() else None,
                     nodes)


def minutes(text: str) -> int | None:
    """Read Slurm's DAYS-HOURS:MINUTES:SECONDS; UNLIMITED is None."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, whole, _ = (int(part or 0) for part in found.groups())
    return 24 * 60 * days + 60 * hours + whole


def host_names(node_list: str) -> list[str]:
    """Expand node[1-3,7] in Slurm's order, which is the order of the ranks."""
    return (slurm("scontrol", "show", "hostnames", node_list) or "").split() if node_list else []


def own_id(environment: Mapping[str, str]) -> str:
    """Return the id by which Slurm's commands mean this job alone.

    An array's last element has the number of the whole array for SLURM_JOB_ID.
    """
    element = environment.get("SLURM_ARRAY_TASK_ID")
    return environment["SLURM_JOB_ID"] if element is None else f"{environment['SLURM_ARRAY_JOB_ID']}_{element}"


def job_fields(job_id: str) -> dict[str, str]:
    """Return a job's fields as `scontrol show job` names them; empty where it does not answer."""
    return fields((slurm("scontrol", "-o", "show", "job", job_id) or "").partition("\n")[0])


def lost_nodes(names: Iterable[str], since: float) -> dict[str, str]:
    """Return which of these nodes are down, or were lost and came back after `since` (seconds), and why."""
    answer = slurm("scontrol", "-o", "show", "node", ",".join(names))
    found = {}
    for line in (answer or "").splitlines():
        node = fields(line)
        state, started = node.get("State", ""), node.get("SlurmdStartTime", "")
        if any(word in state for word in LOST) or state.endswith("*"):
            reason = line.partition(" Reason=")[2].strip()
            found[node["NodeName"]] = f"Slurm says {state}" + (f": {reason}" if reason else "")
        elif started and _local_time(started) > since:
            found[node["NodeName"]] = f"its slurmd was started anew at {started}"
    return found


def max_array_size() -> int:
    """Return how many elements one job array may have; Slurm's default where it does not answer."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", slurm("scontrol", "show", "config") or "")
    return int(found.group(1)) if found else 1001


def _usable(state: str) -> bool:
    return not (state.endswith("*") or any(word in state.upper() for word in LOST))


def _gpus(gres: str) -> int:
    return sum(int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres))


def _local_time(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
