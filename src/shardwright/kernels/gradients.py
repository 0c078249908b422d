"""The gradients of a product, shared by the fused operators: none of them communicates."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shardwright.kernels.quant import WeightQuant, floating_weight

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def wanted(*inputs: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of any of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def of_product(
    x1: Tensor | None, x2: Tensor, weight: WeightQuant | None, dy: Tensor, needed: Sequence[bool]
) -> Gradients:
    """Of x1, x2, bias and x3 in `x1 @ x2 + bias + x3`, of those needed; x1 may be missing where x2's is not."""
    return (
        dy @ floating_weight(x2, weight).T if needed[0] else None,
        of_right(x1, dy, x2) if needed[1] and x1 is not None else None,
        of_bias(dy) if needed[2] else None,
        dy if needed[3] else None,
    )


def of_right(x1: Tensor, dy: Tensor, x2: Tensor) -> Tensor:
    """Of x2 in `x1 @ x2`: `[…, k]`, `[…, n]` → `[k, n]`, in x2's memory order: a weight's view costs no copy."""
    left, right = x1.flatten(0, -2), dy.flatten(0, -2)
    return (right.T @ left).T if x2.stride(0) == 1 else left.T @ right


def of_bias(dy: Tensor) -> Tensor:
    """Of a bias added to every row: `[…, n]` → `[n]`."""
    return dy.flatten(0, -2).sum(0)
