"""The feed-forward blocks, each cut along F: one all-reduce of T x H forward, one backward."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.kernels.swiglu import swiglu
from shardwright.layers.flow import DEFAULT, Flow
from shardwright.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
"""By `ModelConfig.activation`; `gelu_tanh` is the approximation by tanh (Hendrycks & Gimpel 2016)."""


@final
class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, gate_up: MergedColumnParallelLinear, down: RowParallelLinear) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Tensor, flow: Flow = DEFAULT) -> Tensor:
        """`x [T, H]` → `[T, H]`, both alike on every rank, or both this rank's rows."""
        y: Tensor = self.down(flow.keep.core(swiglu, self.gate_up(x, flow.rows)), flow.rows)
        return y


@final
class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`; with GELU it is GeGLU (Shazeer 2020)."""

    def __init__(self, gate_up: MergedColumnParallelLinear, down: RowParallelLinear, activation: str) -> None:
        super().__init__()
        self.gate_up, self.down, self.activation = gate_up, down, ACTIVATIONS[activation]

    def forward(self, x: Tensor, flow: Flow = DEFAULT) -> Tensor:
        """`x [T, H]` → `[T, H]`, both alike on every rank, or both this rank's rows."""
        y: Tensor = self.down(flow.keep.core(self._gated, self.gate_up(x, flow.rows)), flow.rows)
        return y

    def _gated(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.activation(gate) * up


@final
class PlainMLP(nn.Module):
    """`down(activation(up(x)))`."""

    def __init__(self, up: ColumnParallelLinear, down: RowParallelLinear, activation: str) -> None:
        super().__init__()
        self.up, self.down, self.activation = up, down, ACTIVATIONS[activation]

    def forward(self, x: Tensor, flow: Flow = DEFAULT) -> Tensor:
        """`x [T, H]` → `[T, H]`, both alike on every rank, or both this rank's rows."""
        y: Tensor = self.down(flow.keep.core(self.activation, self.up(x, flow.rows)), flow.rows)
        return y
