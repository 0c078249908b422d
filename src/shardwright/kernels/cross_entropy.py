"""The parts of a cross-entropy that a rank finds in its own logits, and their gradient. Nothing here communicates."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from shardwright.kernels.cpu import passes
from shardwright.kernels.select import select_local


class Implementation(NamedTuple):
    """Both of `logits [T, V_r]` with V_r above 0.

    forward: logits → `[2, T]`, each row's largest and its sum of exponentials less that; and what to keep · backward:
    what was kept, those parts, `factor`, `column` and `less`, each `[T]` → `exp(logits - largest) * factor`, in each
    row's column less `less`.
    """

    forward: Callable[[Tensor], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def implementation(logits: Tensor) -> Implementation:
    """The one for such logits."""
    return IMPLEMENTATIONS[select_local("cross_entropy", logits)]


def _forward(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps the exponentials."""
    parts = logits.new_empty(2, len(logits))
    parts[0] = logits.amax(1)
    powers = (logits - parts[0][:, None]).exp_()
    parts[1] = powers.sum(1)
    return parts, powers


def _backward(powers: Tensor, parts: Tensor, factor: Tensor, column: Tensor, less: Tensor) -> Tensor:
    return (powers * factor[:, None]).scatter_add_(1, column[:, None], -less[:, None])


IMPLEMENTATIONS = {
    "reference": Implementation(_forward, _backward),
    "compiled": Implementation(passes.softmax_parts, passes.cross_entropy_backward),
}
