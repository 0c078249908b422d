"""`RMSNorm`, held whole by every rank."""

from typing import final

from torch import Tensor

from shardwright.comm.group import Group
from shardwright.kernels import reference
from shardwright.layers.layer import ParallelLayer
from shardwright.layout import sharding
from shardwright.layout.spec import Gradient, Specs


@final
class RMSNorm(ParallelLayer):
    """`x / sqrt(mean(x²) + eps) * w` over the last dim of size `size`.

    gradient: `whole` where every rank sees the same x; `partial` where each sees only its heads, as q and k norms do.
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

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., size]` → the same shape."""
        return reference.rms_norm(x, self.weight, self.eps)
