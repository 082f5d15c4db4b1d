"""The process groups of a mesh: a rank opens only its own, and an axis of size 1 opens none."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from hpcpar.layout.mesh import Coordinates, Mesh

Group = dist.ProcessGroup


@dataclass(frozen=True)
class Groups:
    """A rank's groups; None stands for "only me".

    Forward and backward messages of the pipeline have a group each. On NCCL a group's operations run one after the
    other: with a single group, stage i's send of an activation would stand before its receive of a gradient, while
    stage i+1's send of that gradient stands before its receive of the activation.
    """

    mesh: Mesh
    at: Coordinates
    tp: Group | None
    dp: Group | None
    pp_forward: Group | None
    pp_backward: Group | None
    everyone: Group | None

    @property
    def opened(self) -> list[Group]:
        """The groups that exist."""
        return [g for g in (self.tp, self.dp, self.pp_forward, self.pp_backward, self.everyone) if g is not None]

    def close(self) -> None:
        """Free the communicators, except the world's; every member must call."""
        for group in self.opened:
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)


def open_groups(mesh: Mesh, global_rank: int) -> Groups:
    """Open the groups of the ranks [0, mesh.size); only they may call, all in the same order.

    Cost: at most 5 communicators a rank (6 with context parallelism), at any scale.
    """

    def opened(ranks: tuple[int, ...], name: str) -> Group | None:
        if len(ranks) == 1:
            return None
        if name == "everyone" and len(ranks) == dist.get_world_size():
            return dist.group.WORLD
        group: Group = dist.new_group(list(ranks), use_local_synchronization=True, group_desc=name)
        return group

    tp, dp, pp = (mesh.group(axis, global_rank) for axis in ("tp", "dp", "pp"))
    return Groups(
        mesh=mesh,
        at=mesh.coordinates(global_rank),
        tp=opened(tp, "tp"),
        dp=opened(dp, "dp"),
        pp_forward=opened(pp, "pp_forward"),
        pp_backward=opened(pp, "pp_backward"),
        everyone=opened(tuple(range(mesh.size)), "everyone"),
    )
