"""The product in which a column-parallel layer begins: each rank's columns of `x @ w.T + b`.

Decides what of the backward hides what: the gradient of x is on its way between the ranks while that of the weight is
computed. Two forms: `copied_linear` of an x that all ranks hold alike, `gathered_linear` of one dealt out by rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwright.comm.group import Group
from shardwright.kernels.gradients import of_bias, wanted
from shardwright.kernels.siblings import all_gather_matmul

LinearGradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def copied_linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, tag: str = "") -> Tensor:
    """`x [T, I]`, alike on every rank, `weight [O_r, I]` → `[T, O_r]`.

    backward: `dx = all_reduce(dy @ w)`, under way while `dw = dy.T @ x` and `db` are computed.
    """
    if not wanted(x, weight, bias):
        return F.linear(x, weight, bias)
    y: Tensor = _CopiedLinear.apply(x, weight, bias, group, tag)  # type: ignore[no-untyped-call]
    return y


def gathered_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int], group: Group, tag: str = ""
) -> Tensor:
    """`x_r [T_r, I]`, this rank's rows of all `sizes`, `weight [O_r, I]` → `[T, O_r]`.

    Only x_r is kept for the backward, which gathers again: behind `dy @ w`; and the reduce-scatter of that is under way
    while `dw` and `db` are computed (Korthikanti et al. 2022, section 4.2.2).
    """
    if not wanted(x, weight, bias):
        return all_gather_matmul(x, weight.T, group, sizes=sizes, bias=bias, tag=tag)[0]
    y: Tensor = _GatheredLinear.apply(x, weight, bias, tuple(sizes), group, tag)  # type: ignore[no-untyped-call]
    return y


class _CopiedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, tag: str) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.group, ctx.tag = group, tag
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        under_way = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            under_way = ctx.group.all_reduce_async(dx, out=dx, tag=f"{ctx.tag}/grad")
        dw = of_weight(dy, x) if ctx.needs_input_grad[1] else None
        db = of_bias(dy) if ctx.needs_input_grad[2] else None
        return under_way.wait() if under_way else None, dw, db, None, None


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...], group: Group, tag: str
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.group, ctx.sizes, ctx.tag = group, sizes, tag
        return all_gather_matmul(x, weight.T, group, sizes=sizes, bias=bias, tag=tag)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        group, tag = ctx.group, ctx.tag
        gathered = group.all_gather_async(x, 0, ctx.sizes, tag=f"{tag}/again") if ctx.needs_input_grad[1] else None
        scattered = None
        if ctx.needs_input_grad[0]:
            scattered = group.reduce_scatter_async(dy @ weight, 0, ctx.sizes, tag=f"{tag}/grad")
        dw = of_weight(dy, gathered.wait()) if gathered else None
        db = of_bias(dy) if ctx.needs_input_grad[2] else None
        return scattered.wait() if scattered else None, dw, db, None, None, None


def of_weight(dy: Tensor, x: Tensor) -> Tensor:
    """Of `weight [O, I]` in `x @ weight.T`, for all rows of `x [..., I]`."""
    return dy.flatten(0, -2).T @ x.flatten(0, -2)
