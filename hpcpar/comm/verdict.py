"""Who is to blame when ranks wait for one another: pure functions of what every rank's recorder says.

Asked in this order, as each can hide behind the next:
    mismatch   two ranks of a group made different calls at the same place in the group's sequence
    unheard    a host does not answer: it or its network is gone
    stopped    a process is stopped (SIGSTOP)
    silent     a rank is at its own work, without a sign of life beyond its phase's limit
    missing    all wait: whom the earliest wait is for, and who waits elsewhere or has ended
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hpcpar.comm.recorder import Call

BUSY_FACTOR = 10
"""How many times its limit a rank may be busy without progress: long, but not endless."""


@dataclass(frozen=True)
class Testimony:
    """What is known of a rank: `manner` is waiting, working, stopped, failed, done or gone."""

    rank: int
    manner: str
    quiet_s: float = 0.0  # since its last note or call
    busy: bool = False  # whether it used its processor meanwhile
    limit_s: float = 0.0  # of its phase
    step: int | None = None
    phase: str = ""
    action: str = ""
    waiting: Call | None = None
    calls: tuple[Call, ...] = ()
    stack: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The guilty rank and why."""

    rank: int
    error: str
    message: str
    call: Call | None = None


def judge(told: Sequence[Testimony], unheard: Sequence[int] = (), host: str = "") -> Verdict | None:
    """Return the verdict on ranks that do not get on; None if there is none yet: someone may just be busy.

    `unheard`: the ranks whose host (the first of them: `host`) gave no answer.
    """
    found = mismatch(told, strict=True)
    if found is None and unheard:
        found = Verdict(unheard[0], "HostSilent", f"host {host} with its {len(unheard)} ranks does not answer: "
                        "it is down, cut off, or its file system hangs")
    return found or _stopped(told) or _silent(told) or _missing(told)


def _stopped(told: Sequence[Testimony]) -> Verdict | None:
    for one in told:
        if one.manner == "stopped":
            return Verdict(one.rank, "Stopped", f"the process has been stopped (SIGSTOP) for {one.quiet_s:.0f} s")
    return None


def _silent(told: Sequence[Testimony]) -> Verdict | None:
    own_work = sorted((one for one in told if one.manner == "working"), key=lambda one: -one.quiet_s)
    for one in own_work:
        limit_s = one.limit_s * (BUSY_FACTOR if one.busy else 1)
        if one.quiet_s > limit_s:
            how = "busy, but without progress" if one.busy else "no sign of life"
            return Verdict(one.rank, "Silent", f"{how} for {one.quiet_s:.0f} s in phase {one.phase} "
                           f"(limit {limit_s:.0f} s), outside of any call to other ranks")
    return None


def _missing(told: Sequence[Testimony]) -> Verdict | None:
    """All that are left wait: follow the earliest wait that can be followed."""
    by_rank = {one.rank: one for one in told}
    absent_of = {one.rank: _absent(one, by_rank) for one in told}
    waits = sorted((one for one in told if one.waiting is not None), key=lambda one: one.waiting.waited)  # type: ignore[union-attr]
    for one in waits:
        call = one.waiting
        assert call is not None
        absent = absent_of[one.rank]
        if not absent:
            continue
        if any(by_rank[rank].manner == "working" for rank in _reached(one.rank, absent_of)):
            return None  # whoever is waited for, perhaps over several ranks, may still come
        if len(absent) > max(1, len(call.ranks) // 2):
            return Verdict(one.rank, "Mismatch", f"made a call that {len(absent)} of {len(call.ranks)} ranks of its "
                           f"group did not make: {call}", call)
        other = by_rank[absent[0]]
        place = f"it waits in {other.waiting}" if other.waiting else f"it is {other.manner}"
        return Verdict(other.rank, "Mismatch", f"never made a call that rank {one.rank} waits for: {call}; {place}",
                       other.waiting or (other.calls[-1] if other.calls else None))
    if waits and len(waits) == len(told):
        one, call = waits[0], waits[0].waiting
        assert call is not None
        return Verdict(one.rank, "Stuck", "every rank has arrived, but the call does not complete (network, driver or "
                       f"library): {call}", call)
    return None


def _absent(one: Testimony, by_rank: Mapping[int, Testimony]) -> list[int]:
    """List the ranks that a waiting rank's call needs and that have not begun it."""
    call = one.waiting
    return [] if call is None else [rank for rank in _awaited(call, one.rank)
                                    if rank in by_rank and not _arrived(by_rank[rank], call, one.rank)]


def _reached(rank: int, absent_of: Mapping[int, Sequence[int]]) -> set[int]:
    """Follow waits: the ranks that a rank waits for, those that these wait for, and so on."""
    found: set[int] = set()
    new = list(absent_of[rank])
    while new:
        found.update(new)
        new = [other for one in new for other in absent_of[one] if other not in found]
    return found


def _awaited(call: Call, rank: int) -> list[int]:
    return [call.peer] if call.peer >= 0 else [other for other in call.ranks if other != rank]


def _arrived(other: Testimony, call: Call, waiting_rank: int) -> bool:
    """Return whether the other rank has begun its side of a call."""
    if call.peer < 0:
        return any(c.group == call.group and c.peer < 0 and c.sequence >= call.sequence for c in other.calls)
    opposite = {"send": "recv", "recv": "send"}[call.operation]
    return any((c.group, c.operation, c.peer) == (call.group, opposite, waiting_rank) and c.sequence >= call.sequence
               for c in other.calls)


# -- calls that differ


@dataclass
class _Sequences:
    """The collectives of one group: by rank, by sequence number."""

    group: str
    calls: dict[int, dict[int, Call]] = field(default_factory=dict)


def mismatch(told: Iterable[Testimony], strict: bool) -> Verdict | None:
    """Return the first place where ranks of a group made different collectives, and who is the odd one.

    Not strict, for a run that seems well: only operation and bytes count, by the marks over all calls so far. Strict,
    once something is wrong: also the step and the line of code, which every rank of a group shares in this program.
    """
    groups: dict[str, _Sequences] = {}
    for one in told:
        for call in one.calls:
            if call.peer < 0:
                of_group = groups.setdefault(call.group, _Sequences(call.group))
                of_group.calls.setdefault(one.rank, {})[call.sequence] = call
    found = [(min(row.values(), key=lambda c: c.begun).begun, group, sequence)
             for group in groups.values() if (sequence := _first_difference(group, strict)) is not None
             for row in [{rank: calls[sequence] for rank, calls in group.calls.items() if sequence in calls}]]
    if not found:
        return None
    _, group, sequence = min(found, key=lambda f: f[0])
    return _odd_one(group, sequence, [other for other in groups.values()
                                      if other is not group and other.group.split()[0] == group.group.split()[0]])


def _key(call: Call, strict: bool) -> tuple[object, ...]:
    return (*call.what, call.mark, call.step, call.site) if strict else (*call.what, call.mark)


def _first_difference(group: _Sequences, strict: bool) -> int | None:
    numbers = sorted(set().union(*group.calls.values()))
    for number in numbers:
        here = [calls[number] for calls in group.calls.values() if number in calls]
        if len({_key(call, strict) for call in here}) > 1:
            return number
    return None


def _odd_one(group: _Sequences, sequence: int, alike: list[_Sequences]) -> Verdict:
    """Name the rank that differs from most; where a group is split evenly, groups of the same kind vote too."""
    row = {rank: calls[sequence] for rank, calls in group.calls.items() if sequence in calls}
    votes = Counter(_key(call, True) for call in row.values())
    if len({votes[key] for key in votes}) == 1:
        votes += Counter(_key(calls[sequence], True) for other in alike for calls in other.calls.values()
                         if sequence in calls)
    right = max((_key(call, True) for call in row.values()), key=lambda key: votes[key])
    reference = next((rank for rank, call in row.items() if _key(call, True) == right), min(row))
    odd = next((rank for rank in sorted(row, reverse=True) if _key(row[rank], True) != right), max(row))
    mine, theirs = row[odd], row[reference]
    return Verdict(odd, "Mismatch", f"{_difference(group, odd, reference, sequence)}: rank {odd} called {mine}; rank "
                   f"{reference} called {theirs}", mine)


def _difference(group: _Sequences, odd: int, reference: int, sequence: int) -> str:
    """Say in words how two ranks' calls differ from `sequence` on."""
    mine, theirs = group.calls[odd], group.calls[reference]
    a, b = mine[sequence], theirs[sequence]
    if a.what == b.what and a.site == b.site and a.step == b.step:
        return "the ranks' earlier calls differ (they are no longer recorded)"
    if (a.operation, a.site) == (b.operation, b.site) and a.num_bytes != b.num_bytes:
        return f"mis-shaped collective, {a.num_bytes} bytes where the others have {b.num_bytes}"
    if _same_line(a, b) and a.step != b.step:
        if a.step > b.step:
            return f"skipped a collective of step {b.step}"
        return f"one collective too many in step {a.step}"
    (after, steps_on), mine_after = _usual_next(theirs, sequence), mine.get(sequence + 1)
    if after is not None and _same_line(a, after) and a.step - b.step == steps_on:
        if mine_after is None and a.step == b.step:
            return f"skipped or misordered collective ({b.operation} at {b.site})"
        swapped = mine_after is not None and _same_line(mine_after, b)
        return "misordered collectives" if swapped else f"skipped a collective ({b.operation} at {b.site})"
    if mine_after is not None and _same_line(mine_after, b):
        return f"a collective that the others did not make ({a.operation} at {a.site})"
    return "collectives out of order"


def _usual_next(calls: dict[int, Call], sequence: int) -> tuple[Call | None, int]:
    """Return what follows a call, and how many steps on: the next one, or, if none is known, as an earlier time."""
    for number in (sequence, *sorted((n for n in calls if n < sequence), reverse=True)):
        if number + 1 in calls and _same_line(calls[number], calls[sequence]):
            return calls[number + 1], calls[number + 1].step - calls[number].step
    return None, 0


def _same_line(a: Call, b: Call) -> bool:
    return (a.what, a.site) == (b.what, b.site)
