"""RMSNorm: the reference's values to rounding in fewer passes, and closed gradients instead of a chain.

Keeps only x and one number a row for the backward.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwright.kernels.cpu import passes
from shardwright.kernels.gradients import wanted
from shardwright.kernels.select import select_local


class Implementation(NamedTuple):
    """forward: x, weight, eps → the output, and what each row was multiplied by, `[..., 1]` · backward: x, that,
    weight, dy → dx, dweight.
    """

    forward: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps) * weight` over the last dim, in float32 until the weight, as `reference.rms_norm`."""
    if not wanted(x, weight):
        return _chosen(x).forward(x, weight, eps)[0]
    y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32 if narrow else x.dtype)
    scale = length.square_().div_(max(1, x.shape[-1])).add_(eps).rsqrt_()
    return (x * scale).to(x.dtype).mul_(weight), scale


def _backward(x: Tensor, scale: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Both take the product dy x by a vector, which is one pass over memory."""
    wide = scale.dtype
    x, through = x.to(wide), dy.to(wide)
    product = (through * x).flatten(0, -2)
    along = torch.mv(product, weight.to(wide)).view_as(scale) * scale.pow(3) / max(1, x.shape[-1])
    dx = (through * weight).mul_(scale).addcmul_(x, along, value=-1).to(dy.dtype)
    return dx, torch.mv(product.T, scale.flatten()).to(weight.dtype)


IMPLEMENTATIONS = {
    "reference": Implementation(_forward, _backward),
    "compiled": Implementation(passes.rms_norm, passes.rms_norm_backward),
}


def _chosen(x: Tensor) -> Implementation:
    return IMPLEMENTATIONS[select_local("rms_norm", x)]


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x²) + eps): dx = r dy w - x r³ mean(dy x w), dw = sum r dy x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        chosen = ctx.chosen = _chosen(x)
        y, scale = chosen.forward(x, weight, eps)
        ctx.save_for_backward(x, scale, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, weight = ctx.saved_tensors
        return *ctx.chosen.backward(x, scale, weight, dy), None
