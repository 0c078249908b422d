"""Rotary embedding for training: the reference's values; turning back is turning by the opposite angle."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwright.kernels import reference
from shardwright.kernels.gradients import wanted


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x [T, heads, D]` turned by the angles of `cos, sin [T, D/2]`, as `reference.rotary`; angles have no gradient."""
    if not wanted(x):
        return reference.rotary(x, cos, sin)
    y: Tensor = _Rotary.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return reference.rotary(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return reference.rotary(dy, cos, -sin), None, None
