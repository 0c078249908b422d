"""The compiled passes of `elementwise`, of tensors: float32 on a CPU. What they compute their kernels' files say.

Whoever takes an address holds the tensor by a name until the call is over.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The output, and what each row was multiplied by, `[..., 1]`."""
    from shardwright.kernels.cpu import elementwise  # imports numba

    x, weight = x.contiguous(), weight.float().contiguous()
    y, scale, width = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1), x.shape[-1]
    elementwise.rms_norm(*_at(x, weight), eps, scale.numel(), width, *_at(y, scale))
    return y, scale


def rms_norm_backward(x: Tensor, scale: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Of x and weight."""
    from shardwright.kernels.cpu import elementwise  # imports numba

    x, wide, dy = x.contiguous(), weight.float().contiguous(), dy.contiguous()
    dx, dweight, width = torch.empty_like(x), torch.empty_like(wide), x.shape[-1]
    elementwise.rms_norm_backward(*_at(x, scale, wide, dy), scale.numel(), width, *_at(dx, dweight))
    return dx, dweight.to(weight.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """`[..., 2 F_r]` → `[..., F_r]`."""
    from shardwright.kernels.cpu import elementwise  # imports numba

    gate_up, width = gate_up.contiguous(), gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], width)
    elementwise.swiglu(gate_up.data_ptr(), y.numel() // max(1, width), width, y.data_ptr())
    return y


def swiglu_backward(gate_up: Tensor, dy: Tensor) -> Tensor:
    """Of gate_up."""
    from shardwright.kernels.cpu import elementwise  # imports numba

    gate_up, dy = gate_up.contiguous(), dy.contiguous()
    grad, width = torch.empty_like(gate_up), dy.shape[-1]
    elementwise.swiglu_backward(*_at(gate_up, dy), dy.numel() // max(1, width), width, grad.data_ptr())
    return grad


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """`[T, heads, D]` turned, or turned back; heads that lie side by side need no copy, whatever is between tokens."""
    from shardwright.kernels.cpu import elementwise  # imports numba

    tokens, heads, size = x.shape
    x = x if x.stride()[1:] == (size, 1) else x.contiguous()
    cos, sin, sign = cos.contiguous(), sin.contiguous(), -1.0 if back else 1.0
    y, stride = x.new_empty(x.shape), 4 * x.stride(0)
    elementwise.rotary(x.data_ptr(), stride, *_at(cos, sin), sign, tokens, heads, size // 2, y.data_ptr())
    return y


def softmax_parts(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest, and its sum of exponentials less that, `[2, T]`; what is kept are the logits."""
    from shardwright.kernels.cpu import elementwise  # imports numba

    logits = logits.contiguous()
    parts = logits.new_empty(2, len(logits))
    elementwise.softmax_parts(logits.data_ptr(), *logits.shape, parts.data_ptr())
    return parts, logits


def cross_entropy_backward(logits: Tensor, parts: Tensor, factor: Tensor, column: Tensor, less: Tensor) -> Tensor:
    """Of the logits."""
    from shardwright.kernels.cpu import elementwise  # imports numba

    dlogits, numbers = torch.empty_like(logits), (factor.contiguous(), column.contiguous(), less.contiguous())
    elementwise.cross_entropy_backward(*_at(logits, parts, *numbers), *logits.shape, dlogits.data_ptr())
    return dlogits


def _at(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)
