"""Rank <-> coordinates on the mesh (pp, dp, cp, tp), tp fastest so that it stays on one node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

AXES = ("pp", "dp", "cp", "tp")
GROUPS = ("tp", "dp", "dp_across", "pp_forward", "pp_backward", "everyone")


class Coordinates(NamedTuple):
    """A rank's place on every axis of the mesh."""

    pp_rank: int
    dp_rank: int
    cp_rank: int
    tp_rank: int

    def __str__(self) -> str:
        return " ".join(f"{axis} {value}" for axis, value in zip(AXES, self, strict=True))


@dataclass(frozen=True)
class Mesh:
    """The sizes of the axes.

    `dp_inner` consecutive dp ranks exchange among themselves before those of the same place in each such run do
    (hybrid sharding); None: dp is one run.
    """

    pp_size: int = 1
    dp_size: int = 1
    cp_size: int = 1
    tp_size: int = 1
    dp_inner: int | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Sizes in mesh order."""
        return self.pp_size, self.dp_size, self.cp_size, self.tp_size

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.pp_size * self.dp_size * self.cp_size * self.tp_size

    def coordinates(self, global_rank: int) -> Coordinates:
        """Return the place of a global rank."""
        rest, places = global_rank, []
        for size in reversed(self.sizes):
            rest, place = divmod(rest, size)
            places.append(place)
        return Coordinates(*reversed(places))

    def rank(self, at: Coordinates) -> int:
        """Return the global rank at a place."""
        rank = 0
        for size, place in zip(self.sizes, at, strict=True):
            rank = rank * size + place
        return rank

    def group(self, axis: str, global_rank: int) -> tuple[int, ...]:
        """Return the global ranks that differ from `global_rank` on `axis` only, in axis order."""
        at, index = self.coordinates(global_rank), AXES.index(axis)
        places = [at._replace(**{f"{axis}_rank": i}) for i in range(self.sizes[index])]
        return tuple(self.rank(place) for place in places)

    def members(self, name: str, global_rank: int) -> tuple[int, ...]:
        """Return the global ranks of a rank's process group, by its name: one of GROUPS."""
        if name == "everyone":
            return tuple(range(self.size))
        ranks = self.group(name[:2], global_rank)
        if not name.startswith("dp"):
            return ranks
        inner = self.dp_inner or self.dp_size
        run, place = divmod(ranks.index(global_rank), inner)
        return ranks[place::inner] if name == "dp_across" else ranks[run * inner:(run + 1) * inner]
