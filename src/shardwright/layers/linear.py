"""The linears, by how their weight is cut. `w` is `[out, in]`, as in torch; `_r` is this rank's part."""

from collections.abc import Sequence
from typing import final

import torch.nn.functional as F
from torch import Tensor

from shardwright.comm.group import Group
from shardwright.layers.layer import ParallelLayer
from shardwright.layers.rows import WHOLE, Rows
from shardwright.layout import sharding
from shardwright.layout.heads import HeadPartition
from shardwright.layout.partition import Partition
from shardwright.layout.spec import Gradient, Specs


@final
class ReplicatedLinear(ParallelLayer):
    """`y = x @ w.T + b`, whole on every rank; inputs and outputs are alike everywhere and nothing moves."""

    def __init__(
        self, in_features: int, out_features: int, group: Group, *, bias: bool = False, name: str = "linear"
    ) -> None:
        super().__init__(group, name)
        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias
        self._build()

    def _specs(self, rank: int, dtype: str) -> Specs:
        sizes: dict[str, tuple[int, ...]] = {"weight": (self.out_features, self.in_features)}
        if self.has_bias:
            sizes["bias"] = (self.out_features,)
        return sharding.replicated(sizes, self.group.size, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`x [T, I]` → `y [T, O]`."""
        return F.linear(x, self.weight, self.bias)


class ColumnLinear(ParallelLayer):
    """Shared by the column-parallel linears: the input is alike on all ranks, the output is this rank's part."""

    def forward(self, x: Tensor, rows: Rows = WHOLE) -> Tensor:
        """`x [T, I]`, or this rank's rows of it → `y_r [T, O_r]`."""
        return enter_together(x, (self,), rows)[0]


def enter_together(x: Tensor, linears: Sequence[ColumnLinear], rows: Rows) -> tuple[Tensor, ...]:
    """What column-parallel linears that begin at one place make of it, in one move: `[T, O_r]` of each.

    x: their one input `[T, I]`, or the input of each side by side, `[T, n I]`; or this rank's rows of that. Backward:
    one all-reduce (or reduce-scatter) of the gradient of x.
    """
    first = linears[0]
    return rows.enter(x, [(linear.weight, linear.bias) for linear in linears], first.group, first.name)


@final
class ColumnParallelLinear(ColumnLinear):
    """`y = x @ w.T + b` with `w` cut along its output dimension.

    ======  ========  ==========================
    tensor  whole     on this rank
    ======  ========  ==========================
    x       [T, I]    x   [T, I], alike on every rank
    w       [O, I]    w_r [O_r, I]
    y       [T, O]    y_r [T, O_r]
    ======  ========  ==========================

    forward:   y_r = x @ w_r.T + b_r        nothing moves
    backward:  dx = all_reduce(dy_r @ w_r);  dw_r = dy_r.T @ x;  db_r = sum_T dy_r        one all-reduce of T x I

    dw_r and db_r are computed while dx is on its way. With `SharedRows` x is dealt out by rows (`layers.rows`).
    """

    def __init__(
        self, in_features: int, out_features: Partition, group: Group, *, bias: bool = False, name: str = "linear"
    ) -> None:
        super().__init__(group, name, out_features)
        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias
        self._build()

    def _specs(self, rank: int, dtype: str) -> Specs:
        return sharding.column_linear(self.in_features, self.out_features, rank, bias=self.has_bias, dtype=dtype)


@final
class MergedColumnParallelLinear(ColumnLinear):
    """Several column-parallel linears of one input as one matmul: `y_r [T, sum O_r]`, part after part.

    Each part is cut by itself, so a rank holds matching slices of gate and up; load them with shard_id 0, 1, ….
    Forward and backward move what `ColumnParallelLinear` does.
    """

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[Partition],
        group: Group,
        *,
        bias: bool = False,
        name: str = "linear",
    ) -> None:
        super().__init__(group, name, *out_features)
        self.in_features, self.out_features, self.has_bias = in_features, tuple(out_features), bias
        self._build()

    def _specs(self, rank: int, dtype: str) -> Specs:
        return sharding.merged_column_linear(self.in_features, self.out_features, rank, bias=self.has_bias, dtype=dtype)


@final
class QKVParallelLinear(ColumnLinear):
    """Query, key and value projections as one matmul, cut by heads: `y_r [T, (N_r + 2 K_r) D]`.

    A rank holds its query heads and every KV head they need, so a KV head whose group straddles ranks is held, and
    computed, by each of them; its gradient is partial there (see `layers.gradients`). Load with shard_id "q", "k", "v".
    Forward and backward move what `ColumnParallelLinear` does.
    """

    def __init__(
        self,
        in_features: int,
        heads: HeadPartition,
        head_size: int,
        group: Group,
        *,
        bias: bool = False,
        name: str = "qkv",
    ) -> None:
        super().__init__(group, name, heads.query)
        self.in_features, self.heads, self.head_size, self.has_bias = in_features, heads, head_size, bias
        self._build()

    def _specs(self, rank: int, dtype: str) -> Specs:
        return sharding.qkv_linear(self.in_features, self.heads, self.head_size, rank, bias=self.has_bias, dtype=dtype)


@final
class RowParallelLinear(ParallelLayer):
    """`y = x @ w.T + b` with `w` cut along its input dimension.

    ======  ========  ==========================
    tensor  whole     on this rank
    ======  ========  ==========================
    x       [T, I]    x_r [T, I_r]
    w       [O, I]    w_r [O, I_r]
    y       [T, O]    y   [T, O], alike on every rank
    ======  ========  ==========================

    forward:   y = all_reduce(x_r @ w_r.T) + b        one all-reduce of T x O
    backward:  dx_r = dy @ w_r;  dw_r = dy.T @ x_r;  db = sum_T dy        nothing moves

    The bias is added after the reduce, so it counts once however many ranks there are. gradient: of the bias, `partial`
    where y is dealt out by rows (`layers.rows`).
    """

    def __init__(
        self,
        in_features: Partition,
        out_features: int,
        group: Group,
        *,
        bias: bool = False,
        gradient: Gradient = "whole",
        name: str = "linear",
    ) -> None:
        super().__init__(group, name, in_features)
        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias
        self.gradient = gradient
        self._build()

    def _specs(self, rank: int, dtype: str) -> Specs:
        sizes = self.in_features, self.out_features
        return sharding.row_linear(*sizes, rank, bias=self.has_bias, gradient=self.gradient, dtype=dtype)

    def forward(self, x: Tensor, rows: Rows = WHOLE) -> Tensor:
        """`x_r [T, I_r]` → `y [T, O]`, or this rank's rows of it."""
        return leave_together(((self, x),), rows)


def leave_together(terms: Sequence[tuple[RowParallelLinear, Tensor]], rows: Rows) -> Tensor:
    """The sum of row-parallel linears, each of its own `x_r [T, I_r]`, in one move: `[T, O]`, or this rank's rows.

    What one of them has summed over the ranks need not be: a rank adds up its products first. Each bias is added once.
    """
    first = terms[0][0]
    y = rows.leave([(x, linear.weight) for linear, x in terms], first.group, first.name)
    for linear, _ in terms:
        y = y if linear.bias is None else y + linear.bias
    return y
