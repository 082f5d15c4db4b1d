"""The network's matrices; `parallel/gradients` replaces their products, to say where gradients go."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x [..., in], weight [out, in], bias) -> [..., out]
Products = Callable[..., tuple[Tensor, ...]]  # (x [..., in], matrices) -> each one's [..., out]
Rows = Callable[[Tensor, Tensor], Tensor]  # (numbers [...], weight [rows, width]) -> [..., width]


class Linear(nn.Linear):
    """A matrix that multiplies."""

    product: Product = staticmethod(F.linear)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return self.product(x, self.weight, self.bias)

    def without_bias(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out], the bias left to the caller."""
        return self.product(x, self.weight, None)


def project(x: Tensor, *matrices: Linear) -> tuple[Tensor, ...]:
    """Multiply one input by several matrices."""
    return tuple(matrix(x) for matrix in matrices)


class Table(nn.Embedding):
    """Rows, one a number."""

    def reset_parameters(self) -> None:
        """Draw first values, but not on the meta device, where that imports torch._dynamo: longer than torch itself."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Vocabulary(Table):
    """A row a token, looked up at the input; where it is tied, also the matrix that scores at the output."""

    product: Product = staticmethod(F.linear)
    rows: Rows = staticmethod(F.embedding)

    def score(self, x: Tensor) -> Tensor:
        """Map [..., hidden] to logits [..., rows]."""
        return self.product(x, self.weight, None)
