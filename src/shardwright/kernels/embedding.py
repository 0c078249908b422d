"""Looking up the rows of a table's part: words that another rank has give zeros, and rows nobody asks for cost nothing.

The gradient is laid where the table's owner wants it (`gradients.offer`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwright.kernels.gradients import wanted, withdraw


def embedding(ids: Tensor, table: Tensor, first: int) -> Tensor:
    """`ids [T]` → `[T, H]`: rows of `table [V_r, H]`, whose first one is word `first`'s; V_r above 0."""
    if not wanted(table):
        return _looked_up(*_mine(ids, table, first), table)
    y: Tensor = _Embedding.apply(ids, table, first)  # type: ignore[no-untyped-call]
    return y


def _mine(ids: Tensor, table: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Which ids are in the table, and their rows (0 for the others)."""
    rows = ids - first
    here = (rows >= 0) & (rows < len(table))
    return here, rows.masked_fill(~here, 0)


def _looked_up(here: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    return F.embedding(rows, table).masked_fill_(~here[..., None], 0)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor, first: int) -> Tensor:
        here, rows = _mine(ids, table, first)
        ctx.save_for_backward(here, rows, table)
        return _looked_up(here, rows, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, None]:
        here, rows, table = ctx.saved_tensors
        place = withdraw(table) if dy.dtype == table.dtype else None
        gradient = torch.empty_like(table, dtype=dy.dtype) if place is None else place
        return None, gradient.zero_().index_add_(0, rows, dy.masked_fill(~here[..., None], 0)), None
