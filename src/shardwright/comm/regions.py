"""Where autograd meets communication: a forward move and its conjugate backward move.

================  =======================  =======================
region            forward                  backward
================  =======================  =======================
copy              x on every rank          all-reduce of the gradients
reduce            all-reduce               the gradient on every rank
scatter           this rank's share        all-gather of the shares
gather            all-gather of shares     this rank's share
sequence_scatter  reduce-scatter           all-gather of the shares
================  =======================  =======================

A column-parallel layer begins with `copy`. `Group` itself is not differentiable; beside these moves only the fused
matmuls in `kernels` communicate and differentiate. `sum_gradients` is `copy` for a tensor of one's own. Backward calls
carry the forward's tag and `/grad`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwright.comm.group import Group
from shardwright.errors import UnsupportedError


def copy(x: Tensor, group: Group, tag: str = "") -> Tensor:
    """`x` itself; its gradient is the sum of all ranks' gradients."""
    return _applied(_Copy, x, group, tag) if torch.is_grad_enabled() and x.requires_grad else x


def reduce(x: Tensor, group: Group, tag: str = "") -> Tensor:
    """The sum of all ranks' `x`; the gradient of each rank's part is the gradient of the sum."""
    return _applied(_Reduce, x, group, tag)


def sum_gradients(x: Tensor, group: Group, tag: str = "") -> Tensor:
    """`x`, whose gradient becomes the sum of all ranks' gradients. Unlike `copy` it may be changed in place after that.

    For a result that nothing else has read yet: readers of `x` itself are meant too.
    """

    def summed(gradient: Tensor) -> Tensor:
        if gradient.requires_grad:
            raise UnsupportedError(f"{tag}: a gradient summed over ranks has no gradient of its own; drop create_graph")
        return group.all_reduce(gradient, tag=f"{tag}/grad")

    if x.requires_grad:
        x.register_hook(summed)  # type: ignore[no-untyped-call]
    return x


def scatter(x: Tensor, dim: int, sizes: Sequence[int], group: Group, tag: str = "") -> Tensor:
    """This rank's share of `x`, which all ranks hold alike, along `dim`; gradients are gathered."""
    return _applied(_Scatter, x, group, tag, dim, tuple(sizes))


def gather(x: Tensor, dim: int, sizes: Sequence[int], group: Group, tag: str = "") -> Tensor:
    """All ranks' shares joined along `dim`; what follows is alike on all ranks, so each keeps its share's gradient."""
    return _applied(_Gather, x, group, tag, dim, tuple(sizes))


def sequence_scatter(x: Tensor, sizes: Sequence[int], group: Group, tag: str = "") -> Tensor:
    """This rank's `sizes[rank]` rows of the sum of all ranks' `x`; the gradients of the rows are gathered."""
    return _applied(_SequenceScatter, x, group, tag, tuple(sizes))


def _applied(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, tag: str) -> Tensor:
        ctx.group, ctx.tag = group, tag
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.group.all_reduce(gradient, tag=f"{ctx.tag}/grad"), None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, tag: str) -> Tensor:
        return group.all_reduce(x, tag=tag)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, tag: str, dim: int, sizes: tuple[int, ...]) -> Tensor:
        group.check_whole(x, dim, sizes)
        ctx.group, ctx.tag, ctx.dim, ctx.sizes = group, tag, dim, sizes
        return _share(x, dim, sizes, group.rank)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        whole = ctx.group.all_gather(gradient, ctx.dim, ctx.sizes, tag=f"{ctx.tag}/grad")
        return whole, None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, tag: str, dim: int, sizes: tuple[int, ...]) -> Tensor:
        ctx.rank, ctx.dim, ctx.sizes = group.rank, dim, sizes
        return group.all_gather(x, dim, sizes, tag=tag)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _share(gradient, ctx.dim, ctx.sizes, ctx.rank), None, None, None, None


class _SequenceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, tag: str, sizes: tuple[int, ...]) -> Tensor:
        ctx.group, ctx.tag, ctx.sizes = group, tag, sizes
        return group.reduce_scatter(x, 0, sizes, tag=tag)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        whole = ctx.group.all_gather(gradient.contiguous(), 0, ctx.sizes, tag=f"{ctx.tag}/grad")
        return whole, None, None, None


def _share(x: Tensor, dim: int, sizes: tuple[int, ...], rank: int) -> Tensor:
    return x.narrow(dim, sum(sizes[:rank]), sizes[rank]).contiguous()
