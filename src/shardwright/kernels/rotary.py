"""Rotary embedding: the reference's values to rounding; turning back is turning by the opposite angle."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwright.kernels import reference
from shardwright.kernels.cpu import passes
from shardwright.kernels.gradients import wanted
from shardwright.kernels.select import select_local


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x [T, heads, D]` turned by the angles of `cos, sin [T, D/2]`, as `reference.rotary`; angles have no gradient."""
    if not wanted(x):
        return _turned(x, cos, sin)
    y: Tensor = _Rotary.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


def partial_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotary` of the first dims of each head, as many as there are angles for; the others stay."""
    turned = 2 * cos.shape[-1]
    return torch.cat((rotary(x[..., :turned], cos, sin), x[..., turned:]), -1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    return IMPLEMENTATIONS[select_local("rotary", x)](x, cos, sin, back=back)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    return reference.rotary(x, cos, -sin if back else sin)


IMPLEMENTATIONS = {"reference": _rotary, "compiled": passes.rotary}


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _turned(dy, *ctx.saved_tensors, back=True), None, None
