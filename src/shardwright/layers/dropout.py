"""Dropout whose draws depend on (seed, name, step, global index) alone: the same at every split of tensors or data."""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwright.errors import UsageError
from shardwright.layers import random


@dataclass(frozen=True)
class Dropout:
    """One step's dropout on the residual stream: elements are zeroed with probability `p`, the others scaled.

    seed, step: of the draws · first_row: the number, in the step's whole batch, of the first row of this forward's
    batch. The mask is drawn again in the backward and never kept.
    """

    p: float
    seed: int
    step: int
    first_row: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise UsageError("dropout", self.p, "a probability below 1", "use 0 for none, 0.1 for a tenth")

    @final
    def __call__(self, x: Tensor, name: str, offset: int) -> Tensor:
        """`x [rows, H]`, whose first row is number `offset` of the forward's batch; `name` says where in the model."""
        if self.p == 0:
            return x
        y: Tensor = _Dropped.apply(x, self, name, offset)  # type: ignore[no-untyped-call]
        return y

    @final
    def mask(self, x: Tensor, name: str, offset: int) -> Tensor:
        """0 or `1 / (1 - p)` for each element, of x's shape and dtype."""
        rows, width = x.shape
        first = (self.first_row + offset) * width
        index = torch.arange(first, first + rows * width, device=x.device).view(rows, width)
        kept = random.uniform(self.seed, f"dropout.{name}", self.step, index) >= self.p
        return kept.to(x.dtype) / (1 - self.p)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: Dropout, name: str, offset: int) -> Tensor:
        ctx.dropout, ctx.name, ctx.offset = dropout, name, offset
        return x * dropout.mask(x, name, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return dy * ctx.dropout.mask(dy, ctx.name, ctx.offset), None, None, None
