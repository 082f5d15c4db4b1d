"""What PyTorch builds on process groups, over the MPI backend, compared with one process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

pytestmark = pytest.mark.mpi


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))


def batch(size: int) -> Tensor:
    return torch.randn(2 * size, 16, generator=torch.Generator().manual_seed(1))


def reference(size: int) -> tuple[Tensor, list[Tensor]]:
    """Loss and parameters after one step of SGD on the whole batch in one process."""
    plain = network()
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    loss = plain(batch(size)).pow(2).mean()
    loss.backward()
    optimizer.step()
    return loss.detach(), [p.detach() for p in plain.parameters()]


def step(model: nn.Module, mine: Tensor) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = model(mine).pow(2).mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def test_ddp(world: SimpleNamespace) -> None:
    model = nn.parallel.DistributedDataParallel(network(), bucket_cap_mb=0.001)
    step(model, batch(world.size).chunk(world.size)[world.rank])
    torch.testing.assert_close([p.detach() for p in model.parameters()], reference(world.size)[1])


def test_fsdp2(world: SimpleNamespace) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    model = network()
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step(model, batch(world.size).chunk(world.size)[world.rank])
    torch.testing.assert_close([p.detach().full_tensor() for p in model.parameters()], reference(world.size)[1])


def test_tensor_parallel(world: SimpleNamespace) -> None:
    mesh = init_device_mesh("cpu", (world.size // 2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(network(), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    loss = step(model, batch(world.size))
    expected_loss, expected = reference(world.size)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close([p.detach().full_tensor() for p in model.parameters()], expected)


def test_pipeline_1f1b(world: SimpleNamespace) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16) for _ in range(world.size)]
    inputs, num_microbatches = batch(world.size), 2 * world.size
    mine = layers[world.rank]
    stage = PipelineStage(mine, world.rank, world.size, torch.device("cpu"), group=dist.group.WORLD)
    schedule = Schedule1F1B(stage, num_microbatches, loss_fn=lambda out, target: (out - target).pow(2).mean())
    losses: list[Tensor] = []
    if world.rank == 0:
        schedule.step(inputs)
    elif world.rank == world.size - 1:
        schedule.step(target=torch.zeros_like(inputs), losses=losses)
    else:
        schedule.step()
    got = mine.weight.grad
    plain = nn.Sequential(*layers)
    assert got is not None
    got = got.clone()
    plain.zero_grad()
    loss = plain(inputs).pow(2).mean()
    loss.backward()
    torch.testing.assert_close(got, mine.weight.grad)
    if losses:
        torch.testing.assert_close(torch.stack(losses).mean().detach(), loss.detach())
