"""Dropout whose draws depend on (seed, name, step, global index) alone: the same at every split of tensors or data."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwright.errors import UsageError
from shardwright.layers import random

Mask = Callable[[Tensor], Tensor]
"""0 or `1 / (1 - p)` for each element of a tensor, of its shape and dtype."""

KEYS = 1 << 20
"""More keys than any sequence has: the index of an attention weight is that of its query and head, times so many."""


@dataclass(frozen=True)
class Dropout:
    """One step's dropout: elements are zeroed with probability `p` on the residual stream, `attention` among the
    weights of attention; the others are scaled.

    seed, step: of the draws · first_row: the number, in the step's whole batch, of the first row of this forward's
    batch. A mask is drawn again in the backward and never kept.
    """

    p: float
    seed: int
    step: int
    first_row: int = 0
    attention: float = 0.0

    def __post_init__(self) -> None:
        for name, p in (("dropout", self.p), ("attention_dropout", self.attention)):
            if not 0 <= p < 1:
                raise UsageError(name, p, "a probability below 1", "use 0 for none, 0.1 for a tenth")

    @final
    def __call__(self, x: Tensor, name: str, offset: int) -> Tensor:
        """`x [rows, H]`, whose first row is number `offset` of the forward's batch; `name` says where in the model."""
        return _dropped(x, partial(self._rows, name=name, offset=offset)) if self.p else x

    @final
    def weights(self, x: Tensor, name: str, offset: int, heads: tuple[int, int], of: int) -> Tensor:
        """`x [..., N_r, S, L]`, weights of the query heads from heads[0] to heads[1] (excluded) `of` so many; the first
        row of the sequence, or of sequences end to end, is number `offset` of the forward's batch, and a sequence's
        first query sees its first key.
        """
        draw = partial(self._weights, name=name, offset=offset, heads=heads, of=of)
        return _dropped(x, draw) if self.attention else x

    def _rows(self, x: Tensor, name: str, offset: int) -> Tensor:
        rows, width = x.shape
        first = (self.first_row + offset) * width
        index = torch.arange(first, first + rows * width, device=x.device).view(rows, width)
        return self._mask(x, name, index, self.p)

    def _weights(self, x: Tensor, name: str, offset: int, heads: tuple[int, int], of: int) -> Tensor:
        *sequences, held, length, keys = x.shape
        query = torch.arange(prod(sequences) * length, device=x.device).view(*sequences, 1, length, 1)
        head, key = (torch.arange(size, device=x.device) for size in (held, keys))
        index = ((self.first_row + offset + query) * of + (heads[0] + head)[:, None, None]) * KEYS + key
        return self._mask(x, name, index, self.attention)

    def _mask(self, x: Tensor, name: str, index: Tensor, p: float) -> Tensor:
        kept = random.uniform(self.seed, f"dropout.{name}", self.step, index) >= p
        return kept.to(x.dtype) / (1 - p)


def _dropped(x: Tensor, mask: Mask) -> Tensor:
    y: Tensor = _Dropped.apply(x, mask)  # type: ignore[no-untyped-call]
    return y


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Mask) -> Tensor:
        ctx.mask = mask
        return x * mask(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy * ctx.mask(dy), None
