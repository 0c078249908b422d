"""The products in which column-parallel layers begin: each rank's columns of `x @ w.T + b`, of one layer or several.

Decides what of the backward hides what: the gradient of x is on its way between the ranks while those of the weights
are computed. Two forms: `copied_linears` of an x that all ranks hold alike, `gathered_linears` of one dealt out by
rows.

Several layers that begin at one place move no more than one: x is theirs in common, `[T, I]`, or holds the input of
each side by side, `[T, n I]`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwright.comm.group import Group
from shardwright.kernels.gradients import of_bias, of_weight, wanted
from shardwright.kernels.siblings import all_gather_matmul

Product = tuple[Tensor, Tensor | None]
"""Weight `[O_r, I]` and bias `[O_r]` of one layer."""


def copied_linears(x: Tensor, products: Sequence[Product], group: Group, tag: str = "") -> tuple[Tensor, ...]:
    """`x [T, I]` or `[T, n I]`, alike on every rank → `[T, O_r]` of each product.

    backward: `dx = all_reduce(dy @ w)`, the sum or the row of them, under way while each `dw = dy.T @ x` and `db` are
    computed.
    """
    weights, biases = zip(*products, strict=True)
    if not wanted(x, *weights, *biases):
        return _forward(x, weights, biases)
    y: tuple[Tensor, ...] = _CopiedLinears.apply(x, group, tag, *weights, *biases)  # type: ignore[no-untyped-call]
    return y


def gathered_linears(
    x: Tensor, products: Sequence[Product], sizes: Sequence[int], group: Group, tag: str = ""
) -> tuple[Tensor, ...]:
    """`x_r [T_r, I]` or `[T_r, n I]`, this rank's rows of all `sizes` → `[T, O_r]` of each product.

    Only x_r is kept for the backward, which gathers again: behind `dy @ w`; and the reduce-scatter of that is under way
    while each `dw` and `db` are computed (Korthikanti et al. 2022, section 4.2.2).
    """
    weights, biases = zip(*products, strict=True)
    if not wanted(x, *weights, *biases):
        return _gathered_forward(x, weights, biases, sizes, group, tag)
    y: tuple[Tensor, ...] = _GatheredLinears.apply(x, tuple(sizes), group, tag, *weights, *biases)  # type: ignore[no-untyped-call]
    return y


def _inputs(x: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """What of x each product reads."""
    width = weights[0].shape[1]
    return [x] * len(weights) if x.shape[-1] == width else torch.split(x, width, -1)


def _forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(map(F.linear, _inputs(x, weights), weights, biases))


def _gathered_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], sizes: Sequence[int], group: Group, tag: str
) -> tuple[Tensor, ...]:
    if len(weights) == 1:
        return all_gather_matmul(x, weights[0].T, group, sizes=sizes, bias=biases[0], tag=tag)[:1]
    return _forward(group.all_gather(x, 0, sizes, tag=tag), weights, biases)


def _of_input(dys: Sequence[Tensor], weights: Sequence[Tensor], width: int) -> Tensor:
    """This rank's term of the gradient of an x of that width."""
    terms = [dy @ weight for dy, weight in zip(dys, weights, strict=True)]
    if width != weights[0].shape[1]:
        return torch.cat(terms, -1)
    total, *others = terms
    for term in others:
        total += term
    return total


def _of_parameters(
    dys: Sequence[Tensor], x: Tensor | None, weights: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Of all weights, then of all biases, as far as needed; x may be missing where no weight's is."""
    count = len(weights)
    inputs = _inputs(x, weights) if x is not None else ()
    dws = [of_weight(dys[i], inputs[i], weights[i]) if inputs and needed[i] else None for i in range(count)]
    return [*dws, *(of_bias(dys[i]) if needed[count + i] else None for i in range(count))]


class _CopiedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, tag: str, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = _halves(parameters)
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None, *weights)
        ctx.group, ctx.tag, ctx.width = group, tag, x.shape[-1]
        return _forward(x, weights, biases)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        under_way = None
        if ctx.needs_input_grad[0]:
            dx = _of_input(dys, weights, ctx.width)
            under_way = ctx.group.all_reduce_async(dx, out=dx, tag=f"{ctx.tag}/grad")
        of_parameters = _of_parameters(dys, x, weights, ctx.needs_input_grad[3:])
        return under_way.wait() if under_way else None, None, None, *of_parameters


class _GatheredLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: tuple[int, ...], group: Group, tag: str, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases = _halves(parameters)
        ctx.gathers = any(ctx.needs_input_grad[4 : 4 + len(weights)])
        ctx.save_for_backward(x if ctx.gathers else None, *weights)
        ctx.group, ctx.sizes, ctx.tag, ctx.width = group, sizes, tag, x.shape[-1]
        return _gathered_forward(x, weights, biases, sizes, group, tag)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        group, tag = ctx.group, ctx.tag
        gathered = group.all_gather_async(x, 0, ctx.sizes, tag=f"{tag}/again") if ctx.gathers else None
        scattered = None
        if ctx.needs_input_grad[0]:
            dx = _of_input(dys, weights, ctx.width)
            scattered = group.reduce_scatter_async(dx, 0, ctx.sizes, tag=f"{tag}/grad")
        whole = gathered.wait() if gathered else None
        of_parameters = _of_parameters(dys, whole, weights, ctx.needs_input_grad[4:])
        return scattered.wait() if scattered else None, None, None, None, *of_parameters


def _halves(parameters: Sequence[Any]) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """Weights, and then as many biases."""
    half = len(parameters) // 2
    return parameters[:half], parameters[half:]
