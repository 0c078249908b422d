"""What families do to a token's vector before the first layer, and to logits behind the last one.

Each is a class chosen once. They act on whole vectors alike on every rank, or on each logit by itself: nothing moves.
"""

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.comm.group import Group
from shardwright.layers.layer import ParallelLayer
from shardwright.layout import sharding
from shardwright.layout.spec import Gradient, Specs


@final
class AsEmbedded(nn.Module):
    """Embeddings as they are."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x [T, H]` itself."""
        return x


@final
class ScaledEmbedding(nn.Module):
    """Embeddings times a number, which is rounded to their dtype first (Gemma)."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x [T, H]` → `x * scale`."""
        return x * x.new_tensor(self.scale)


@final
class LearnedPositions(ParallelLayer):
    """A table `[P, H]` whose row `offset + position` is added; whole on every rank (GPT-2, OPT).

    gradient: `partial` where each rank adds it to its own rows only (`layers.rows`).
    """

    def __init__(
        self,
        rows: int,
        hidden: int,
        group: Group,
        *,
        offset: int = 0,
        gradient: Gradient = "whole",
        name: str = "positions",
    ) -> None:
        super().__init__(group, name)
        self.rows, self.hidden, self.offset, self.gradient = rows, hidden, offset, gradient
        self._build()

    def _specs(self, rank: int, dtype: str) -> Specs:
        sizes = {"weight": (self.rows, self.hidden)}
        return sharding.replicated(sizes, self.group.size, gradient=self.gradient, dtype=dtype)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x [T, H]`, `positions [T]` int64 → `[T, H]`."""
        return x + F.embedding(positions + self.offset, self.weight)


@final
class CappedLogits(nn.Module):
    """`cap * tanh(logits / cap)` (Gemma 2)."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, logits: Tensor) -> Tensor:
        """`[T, V_r]` → the same shape."""
        return (logits / self.cap).tanh() * self.cap
