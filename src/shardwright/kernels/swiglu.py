"""SwiGLU: the reference's values in fewer passes, and a backward that keeps nothing but its input.

autograd's chain would keep silu(gate) too, F_r numbers a token, and join the halves of the gradient by a copy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwright.kernels.cpu import passes
from shardwright.kernels.gradients import wanted
from shardwright.kernels.select import select_local


class Implementation(NamedTuple):
    """forward: gate_up → the output · backward: gate_up, dy → the gradient of gate_up."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of the two halves of `gate_up [T, 2 F_r]`, as `reference.swiglu`, to rounding."""
    if not wanted(gate_up):
        return _chosen(gate_up).forward(gate_up)
    y: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
    return y


def _forward(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def _backward(gate_up: Tensor, dy: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    grad = torch.empty_like(gate_up)
    dgate, dup = grad.chunk(2, -1)
    torch.mul(dy, F.silu(gate), out=dup)
    torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
    return grad


IMPLEMENTATIONS = {
    "reference": Implementation(_forward, _backward),
    "compiled": Implementation(passes.swiglu, passes.swiglu_backward),
}


def _chosen(x: Tensor) -> Implementation:
    return IMPLEMENTATIONS[select_local("swiglu", x)]


class _SwiGLU(torch.autograd.Function):
    """dgate = dy up s (1 + gate (1 - s)) with s = sigmoid(gate); dup = dy silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        chosen = ctx.chosen = _chosen(gate_up)
        return chosen.forward(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,), chosen = ctx.saved_tensors, ctx.chosen
        gradient: Tensor = chosen.backward(gate_up, dy)
        return gradient
