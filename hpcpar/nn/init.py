"""First weights by parameter name and global element, so that every layout starts from the same model."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcpar.layout.boxes import Box
from hpcpar.layout.parameters import Parameter
from hpcpar.nn.counter import make_key, normal


def initial_values(parameter: Parameter, box: Box, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the first values of a box of a parameter: float64, shape box.size."""
    if parameter.std == 0:
        return torch.full(box.size, parameter.fill, dtype=torch.float64, device=device)
    elements = torch.zeros(box.size, dtype=torch.int64, device=device)
    stride = 1
    for dim in reversed(range(len(box.size))):
        index = torch.arange(box.offset[dim], box.end[dim], dtype=torch.int64, device=device) * stride
        elements += index.reshape([-1 if d == dim else 1 for d in range(len(box.size))])
        stride *= parameter.shape[dim]
    return normal(make_key(seed, parameter.name), elements, parameter.std) + parameter.fill
