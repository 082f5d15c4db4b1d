"""A torch.distributed backend for one process that plays one rank of a world: it takes every call and carries nothing.

What a collective would have brought is made up from this rank's own data, so that values stay ordinary numbers.
torch's own "fake" backend leaves whatever lay in memory, and refuses a reduce-scatter of real tensors.
"""

# ruff: noqa: D102 - the operations are torch's, and so are their descriptions
# mypy: disable-error-code="override, call-arg, assignment"
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not in __all__

from hpcpar.comm.named_group import NamedGroup


@contextmanager
def silent_world(size: int, global_rank: int) -> Iterator[None]:
    """Be one rank of a world of `size` ranks; groups may be opened inside."""
    if not hasattr(dist.Backend, "SILENT"):
        dist.Backend.register_backend("silent", lambda options, _: SilentGroup(options.group_rank, options.group_size),
                                      extended_api=True, devices=["cpu", "cuda"])
    dist.init_process_group("silent", store=HashStore(), rank=global_rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _overlap(one: Tensor, other: Tensor) -> bool:
    # by identity: fake tensors have no address
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


class _Done(dist.Work):
    def is_completed(self) -> bool:
        return True

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        return True


class SilentGroup(NamedGroup):
    """A group whose other members never speak; it has the operations that the trainer uses."""

    def __init__(self, rank: int, size: int):
        super().__init__(rank, size, "silent", ("cpu", "cuda"))

    def carried(self, operation: str, whole: Tensor) -> dist.Work:
        """Return what stands for an exchange of `whole`: done at once; other kinds of silence say otherwise."""
        return _Done()

    def allreduce(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        return self.carried("all_reduce", tensors[0])

    def _allgather_base(self, output: Tensor, source: Tensor, opts: Any = None) -> dist.Work:
        if not _overlap(output, source):  # else it is in its place
            output.view(self.size(), -1).copy_(source.reshape(1, -1))
        return self.carried("all_gather", output)

    def _reduce_scatter_base(self, output: Tensor, source: Tensor, opts: Any) -> dist.Work:
        if not _overlap(output, source):
            output.view(-1).copy_(source.view(self.size(), -1)[self.rank()])
        return self.carried("reduce_scatter", source)

    def send(self, tensors: list[Tensor], dst_rank: int, tag: int) -> dist.Work:
        return _Done()

    def recv(self, tensors: list[Tensor], src_rank: int, tag: int) -> dist.Work:
        tensors[0].normal_()
        return _Done()

    def shutdown(self) -> None:
        pass

    # torch 2.13 calls these by new names
    all_gather_single = _allgather_base
    reduce_scatter_single = _reduce_scatter_base
