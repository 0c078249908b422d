"""The feed-forward blocks, each cut along F: one all-reduce of T x H forward, one backward."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.kernels.swiglu import swiglu
from shardwright.layers.flow import DEFAULT, Flow
from shardwright.layers.linear import (
    ColumnLinear,
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
)

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
"""By `ModelConfig.activation`; `gelu_tanh` is the approximation by tanh (Hendrycks & Gimpel 2016)."""


class MLP(nn.Module, ABC):
    """`down(between(begin(x)))`."""

    down: RowParallelLinear

    @property
    @abstractmethod
    def begin(self) -> ColumnLinear:
        """The first product."""

    @abstractmethod
    def activated(self, x: Tensor) -> Tensor:
        """What the first product has made, to what the second one reads."""

    @final
    def between(self, x: Tensor, flow: Flow) -> Tensor:
        """From the first product to the second, `[T, O_r]` → `[T, F_r]`: nothing moves."""
        return flow.keep.core(self.activated, x)

    def forward(self, x: Tensor, flow: Flow = DEFAULT) -> Tensor:
        """`x [T, H]` → `[T, H]`, both alike on every rank, or both this rank's rows."""
        y: Tensor = self.down(self.between(self.begin(x, flow.rows), flow), flow.rows)
        return y


class _Gated(MLP):
    def __init__(self, gate_up: MergedColumnParallelLinear, down: RowParallelLinear) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    @property
    def begin(self) -> ColumnLinear:
        """Gate and up, one after another."""
        return self.gate_up


@final
class SwiGLU(_Gated):
    """`down(silu(gate(x)) * up(x))`."""

    def activated(self, x: Tensor) -> Tensor:
        """`[T, 2 F_r]` → `[T, F_r]`."""
        return swiglu(x)


@final
class GatedMLP(_Gated):
    """`down(activation(gate(x)) * up(x))`; with GELU it is GeGLU (Shazeer 2020)."""

    def __init__(self, gate_up: MergedColumnParallelLinear, down: RowParallelLinear, activation: str) -> None:
        super().__init__(gate_up, down)
        self.activation = ACTIVATIONS[activation]

    def activated(self, x: Tensor) -> Tensor:
        """`[T, 2 F_r]` → `[T, F_r]`."""
        gate, up = x.chunk(2, -1)
        return self.activation(gate) * up


@final
class PlainMLP(MLP):
    """`down(activation(up(x)))`."""

    def __init__(self, up: ColumnParallelLinear, down: RowParallelLinear, activation: str) -> None:
        super().__init__()
        self.up, self.down, self.activation = up, down, ACTIVATIONS[activation]

    @property
    def begin(self) -> ColumnLinear:
        """Up."""
        return self.up

    def activated(self, x: Tensor) -> Tensor:
        """`[T, F_r]` → the same shape."""
        return self.activation(x)
