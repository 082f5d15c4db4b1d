"""A torch.distributed group made in Python: the names by which torch asks for it."""

# ruff: noqa: D102 - the operations are torch's, and so are their descriptions
# mypy: disable-error-code="override, assignment, call-arg"
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


class NamedGroup(dist.ProcessGroup):
    """Takes the place of a whole group for the devices that it names; a subclass has the operations."""

    def __init__(self, rank: int, size: int, backend_name: str, devices: Sequence[str]):
        super().__init__(rank, size)
        self._backend_name = backend_name
        self._group_name = self._group_desc = ""
        for device in devices:
            self._register_backend(torch.device(device), dist.ProcessGroup.BackendType.CUSTOM, None)

    def getBackendName(self) -> str:
        return self._backend_name

    def getGroupName(self) -> str:
        return self._group_name

    # torch's C++ side asks by method, its Python side by property.
    def _set_group_name(self, name: str) -> None:
        self._group_name = name

    def getGroupDesc(self) -> str:
        return self._group_desc

    def _set_group_desc(self, description: str) -> None:
        self._group_desc = description

    group_name = property(getGroupName)
    group_desc = property(getGroupDesc)
