"""The norms that every rank holds whole, and the one over all heads that is cut by heads."""

from abc import ABC, abstractmethod
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.comm import regions
from shardwright.comm.group import Group
from shardwright.kernels import reference
from shardwright.kernels.rms_norm import rms_norm
from shardwright.layers.layer import ParallelLayer
from shardwright.layout import sharding
from shardwright.layout.heads import HeadPartition
from shardwright.layout.spec import Gradient, Specs


class Norm(ParallelLayer):
    """A norm over the last dim of size `size`, its weight whole on every rank.

    gradient: `whole` where every rank sees the same x; `partial` where each sees only its heads, as q and k norms do,
    or its rows (`layers.rows`).
    """

    def __init__(
        self, size: int, group: Group, *, eps: float = 1e-6, gradient: Gradient = "whole", name: str = "norm"
    ) -> None:
        super().__init__(group, name)
        self.size, self.eps, self.gradient = size, eps, gradient
        self._build()

    def _specs(self, rank: int, dtype: str) -> Specs:
        return sharding.replicated({"weight": (self.size,)}, self.group.size, gradient=self.gradient, dtype=dtype)

    def reset(self, seed: int = 0) -> None:
        """All ones."""
        self.weight.data.fill_(1)


@final
class RMSNorm(Norm):
    """`x / sqrt(mean(x²) + eps) * w`."""

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., size]` → the same shape."""
        return rms_norm(x, self.weight, self.eps)


@final
class OnceRMSNorm(Norm):
    """`x / sqrt(mean(x²) + eps) * w`, rounded once to half types (OLMo-2)."""

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., size]` → the same shape."""
        return reference.rms_norm_once(x, self.weight, self.eps)


@final
class PlusOneRMSNorm(Norm):
    """`x / sqrt(mean(x²) + eps) * (1 + w)` (Gemma)."""

    def reset(self, seed: int = 0) -> None:
        """All zeros."""
        self.weight.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., size]` → the same shape."""
        return reference.rms_norm_plus_one(x, self.weight, self.eps)


@final
class LayerNorm(Norm):
    """`(x - mean(x)) / sqrt(var(x) + eps) * w + b` (Ba et al. 2016)."""

    def _specs(self, rank: int, dtype: str) -> Specs:
        sizes: dict[str, tuple[int, ...]] = {"weight": (self.size,), "bias": (self.size,)}
        return sharding.replicated(sizes, self.group.size, gradient=self.gradient, dtype=dtype)

    def reset(self, seed: int = 0) -> None:
        """Ones and zeros."""
        super().reset(seed)
        assert self.bias is not None
        self.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., size]` → the same shape."""
        return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)


class QKNorm(ParallelLayer, ABC):
    """A norm of queries and keys that knows which heads these are; its weight is cut by heads."""

    def __init__(
        self, heads: HeadPartition, head_size: int, group: Group, *, eps: float, name: str = "qk_norm"
    ) -> None:
        super().__init__(group, name, heads.query)
        self.heads, self.head_size, self.eps = heads, head_size, eps
        self._build()

    def _specs(self, rank: int, dtype: str) -> Specs:
        return sharding.qk_norm(self.heads, self.head_size, rank, dtype=dtype)

    def reset(self, seed: int = 0) -> None:
        """All ones."""
        self.weight.data.fill_(1)

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """`q [T, N_r, D]`, `k [T, K_r, D]` → the same shapes."""


@final
class WideQKNorm(QKNorm):
    """RMSNorm of all query heads as one vector, and of all key heads as another (OLMo-2).

    forward:   one all-reduce of T x 2, the sums of squares        backward:  one of T x 2

    A KV head that several ranks hold is counted by the lowest of them.
    """

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """`q [T, N_r, D]`, `k [T, K_r, D]` → the same shapes."""
        wide = (q.float(), k.float()) if q.dtype in (torch.bfloat16, torch.float16) else (q, k)
        start, stop = self.heads.kv_range(self.group.rank)
        others = int(start < stop and self.heads.kv_holders(start)[0] != self.group.rank)
        counted = wide[0], wide[1][:, others:]
        squares = torch.stack([x.square().sum((1, 2)) for x in counted], 1)
        # Each rank's heads need the sum, so its gradient comes from all of them: a reduce, then a copy.
        squares = regions.copy(regions.reduce(squares, self.group, self.name), self.group, self.name)
        weights = torch.split(self.weight.view(-1, self.head_size), [q.shape[1], k.shape[1]])
        totals = (self.heads.heads * self.head_size, self.heads.kv_heads * self.head_size)
        normed = [
            (x * torch.rsqrt(squares[:, i] / total + self.eps)[:, None, None] * weight).to(q.dtype)
            for i, (x, total, weight) in enumerate(zip(wide, totals, weights, strict=True))
        ]
        return normed[0], normed[1]


@final
class OwnQKNorm(QKNorm):
    """LayerNorm of each query and key head by a weight of its own, without biases (StableLM 2 12B).

    Nothing moves; the weight of a KV head that several ranks hold has a partial gradient.
    """

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """`q [T, N_r, D]`, `k [T, K_r, D]` → the same shapes."""
        weights = torch.split(self.weight.view(-1, self.head_size), [q.shape[1], k.shape[1]])
        return self._normed(q, weights[0]), self._normed(k, weights[1])

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        return (F.layer_norm(wide, (self.head_size,), eps=self.eps) * weight).to(x.dtype)
