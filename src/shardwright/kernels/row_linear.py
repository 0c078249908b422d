"""The product in which a row-parallel layer ends, when it is run again only for its gradients (`unsummed_linear`).

The forward product and its collective are `matmul_all_reduce`'s and `matmul_reduce_scatter`'s.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwright.comm.group import Group
from shardwright.kernels.column_linear import of_weight


def unsummed_linear(x: Tensor, weight: Tensor, sizes: Sequence[int] | None, group: Group, tag: str = "") -> Tensor:
    """A stand-in for `reduce(x @ weight.T)`: its shape and its gradients, and zeros for values.

    `x [T, I_r]`, `weight [O, I_r]` → `[T, O]`, or this rank's rows of it where `sizes` deals them out. For a
    recomputation, in which nobody looks at the values: neither product nor collective of the forward is repeated.
    backward: `dx = dy @ w`, `dw = dy.T @ x`, with `dy` gathered first where rows are dealt out.
    """
    y: Tensor = _UnsummedLinear.apply(x, weight, None if sizes is None else tuple(sizes), group, tag)  # type: ignore[no-untyped-call]
    return y


class _UnsummedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: tuple[int, ...] | None, group: Group, tag: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.sizes, ctx.tag = group, sizes, tag
        rows = x.shape[:-1] if sizes is None else (sizes[group.rank],)
        return x.new_zeros(()).expand(*rows, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.sizes is not None:
            dy = ctx.group.all_gather(dy.contiguous(), 0, ctx.sizes, tag=f"{ctx.tag}/grad")
        return dy @ weight, of_weight(dy, x), None, None, None
