"""The process groups of a mesh: a rank opens only its own, and an axis of size 1 opens none."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from hpcpar.layout.mesh import GROUPS, Coordinates, Mesh

Group = dist.ProcessGroup


@dataclass(frozen=True)
class Groups:
    """A rank's groups, with the names and members of `Mesh.members`; None stands for "only me".

    Forward and backward messages of the pipeline have a group each. On NCCL a group's operations run one after the
    other: with a single group, stage i's send of an activation would stand before its receive of a gradient, while
    stage i+1's send of that gradient stands before its receive of the activation.
    """

    mesh: Mesh
    at: Coordinates
    tp: Group | None
    dp: Group | None
    dp_across: Group | None
    pp_forward: Group | None
    pp_backward: Group | None
    everyone: Group | None

    @property
    def opened(self) -> list[Group]:
        """The groups that exist."""
        return [group for name in GROUPS if (group := getattr(self, name)) is not None]

    def close(self) -> None:
        """Free the communicators, except the world's; every member must call."""
        for group in self.opened:
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)


def open_groups(mesh: Mesh, global_rank: int) -> Groups:
    """Open the groups of the ranks [0, mesh.size); only they may call, all in the same order.

    Cost: at most 5 communicators a rank (6 with hybrid sharding), at any scale.
    """

    def opened(name: str) -> Group | None:
        ranks = mesh.members(name, global_rank)
        if len(ranks) == 1:
            return None
        if name == "everyone" and len(ranks) == dist.get_world_size():
            return dist.group.WORLD
        group: Group = dist.new_group(list(ranks), use_local_synchronization=True, group_desc=name)
        return group

    return Groups(mesh, mesh.coordinates(global_rank), *(opened(name) for name in GROUPS))
