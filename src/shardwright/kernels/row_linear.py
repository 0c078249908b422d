"""The products in which row-parallel layers end, when they are run again only for their gradients (`unsummed_linears`).

The forward products and their collective are `matmul_all_reduce`'s and `matmul_reduce_scatter`'s.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwright.comm.group import Group
from shardwright.kernels.gradients import of_weight

Term = tuple[Tensor, Tensor]
"""`x [T, I_r]` and `weight [O, I_r]` of one layer."""


def unsummed_linears(terms: Sequence[Term], sizes: Sequence[int] | None, group: Group, tag: str = "") -> Tensor:
    """A stand-in for `reduce(sum of x @ weight.T)`: its shape and its gradients, and zeros for values.

    → `[T, O]`, or this rank's rows of it where `sizes` deals them out. For a recomputation, in which nobody looks at
    the values: neither products nor collective of the forward are repeated. backward: `dx = dy @ w`, `dw = dy.T @ x` of
    each term, with `dy` gathered once before where rows are dealt out.
    """
    tensors = [tensor for term in terms for tensor in term]
    y: Tensor = _UnsummedLinears.apply(None if sizes is None else tuple(sizes), group, tag, *tensors)  # type: ignore[no-untyped-call]
    return y


class _UnsummedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sizes: tuple[int, ...] | None, group: Group, tag: str, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.group, ctx.sizes, ctx.tag = group, sizes, tag
        x, weight = tensors[:2]
        rows = x.shape[:-1] if sizes is None else (sizes[group.rank],)
        return x.new_zeros(()).expand(*rows, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        if ctx.sizes is not None:
            dy = ctx.group.all_gather(dy.contiguous(), 0, ctx.sizes, tag=f"{ctx.tag}/grad")
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        return (
            None,
            None,
            None,
            *(gradient for x, weight in pairs for gradient in (dy @ weight, of_weight(dy, x, weight))),
        )
