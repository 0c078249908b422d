"""The gradients of a product, shared by the operators: none of them communicates.

Decides where a weight's gradient comes to lie: in a fresh tensor, or in the place that its owner has offered for the
next one (`offer`), which spares writing it twice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shardwright.kernels.quant import WeightQuant, floating_weight

_PLACE = "gradient_place"

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def wanted(*inputs: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of any of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def offer(weight: Tensor, place: Tensor) -> None:
    """Have the next gradient of a leaf written into `place`, which is like it and holds nothing of worth.

    Autograd is handed the place itself, and takes it for `weight.grad` if there is none, and if nobody else holds this
    tensor: offer a view of your own. Not every gradient comes from a product: look where `.grad` lies.
    """
    vars(weight)[_PLACE] = place


def withdraw(weight: Tensor) -> Tensor | None:
    """The place that is on offer for a weight's gradient, if any; it is on offer no longer."""
    place: Tensor | None = vars(weight).pop(_PLACE, None)
    return place


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
    if x2.stride(0) == 1:
        return of_weight(dy, x1, _turned(x2)).T
    return x1.flatten(0, -2).T @ dy.flatten(0, -2)


def of_weight(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Of `weight [O, I]` in `x @ weight.T`, for all rows of `x [..., I]`."""
    left, right = dy.flatten(0, -2).T, x.flatten(0, -2)
    place = withdraw(weight) if left.dtype == right.dtype == weight.dtype else None
    return left @ right if place is None else torch.mm(left, right, out=place)


def _turned(x2: Tensor) -> Tensor:
    """`x2.T`: the weight itself, where x2 is no more than a view of it."""
    weight, turned = x2._base, x2.T
    if weight is None or weight.data_ptr() != turned.data_ptr():
        return turned
    return weight if (weight.shape, weight.stride()) == (turned.shape, turned.stride()) else turned


def of_bias(dy: Tensor) -> Tensor:
    """Of a bias added to every row: `[…, n]` → `[n]`."""
    return dy.flatten(0, -2).sum(0)
