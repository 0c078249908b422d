"""The SwiGLU feed-forward block."""

from typing import final

from torch import Tensor, nn

from shardwright.kernels.reference import swiglu
from shardwright.layers.linear import MergedColumnParallelLinear, RowParallelLinear


@final
class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`, cut along F: one all-reduce of T x H forward, one backward."""

    def __init__(self, gate_up: MergedColumnParallelLinear, down: RowParallelLinear) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Tensor) -> Tensor:
        """`x [T, H]` → `[T, H]`, both alike on every rank."""
        y: Tensor = self.down(swiglu(self.gate_up(x)))
        return y
