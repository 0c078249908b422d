"""What a training step keeps of a block for its backward, and what it computes again there.

`KeepAll` keeps what autograd asks for. `RecomputeCores` (selective) keeps the products' outputs, and computes again
what is cheap in operations and large in memory: attention's core and the gated activation. `RecomputeBlocks` (full)
keeps only a block's input. A recomputation repeats neither the product nor the collective in which a block ends.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from shardwright.layers.rows import Rows

Core = Callable[[Tensor], Tensor]
"""A part of a block that stays on this rank."""

Block = Callable[[Tensor, Rows], Tensor]
"""A block of the residual stream, norm included: from rows as they lie there to rows as they lie there."""


class Keep(ABC):
    """How blocks and their cores are run."""

    @abstractmethod
    def block(self, run: Block, x: Tensor, rows: Rows) -> Tensor:
        """`run(x, rows)`."""

    @abstractmethod
    def core(self, run: Core, x: Tensor) -> Tensor:
        """`run(x)`."""


@final
class KeepAll(Keep):
    """Nothing is computed twice."""

    def block(self, run: Block, x: Tensor, rows: Rows) -> Tensor:
        """As it stands."""
        return run(x, rows)

    def core(self, run: Core, x: Tensor) -> Tensor:
        """As it stands."""
        return run(x)


@final
class RecomputeCores(Keep):
    """Cores are computed again in the backward; nothing is communicated for it."""

    def block(self, run: Block, x: Tensor, rows: Rows) -> Tensor:
        """As it stands."""
        return run(x, rows)

    def core(self, run: Core, x: Tensor) -> Tensor:
        """Only `x` is kept."""
        return recomputed(run, run, x)


@final
class RecomputeBlocks(Keep):
    """Blocks are computed again in the backward; only a block's input is kept, of its rows those this rank holds."""

    def block(self, run: Block, x: Tensor, rows: Rows) -> Tensor:
        """Only `x` is kept."""
        return recomputed(lambda x: run(x, rows), lambda x: run(x, rows.again()), x)

    def core(self, run: Core, x: Tensor) -> Tensor:
        """As it stands: its block is computed again as a whole."""
        return run(x)


def recomputed(first: Core, again: Core, x: Tensor) -> Tensor:
    """`first(x)`, of which nothing but `x` is kept; the backward takes its gradients from `again(x)`.

    `again` must have the gradients of `first`; its values are not looked at. Gradients of parameters go straight into
    their `.grad`. Where `x` needs no gradient, nor is one taken of what `first` reads.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return first(x)
    y: Tensor = _Recomputed.apply(x, first, again)  # type: ignore[no-untyped-call]
    return y


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Core, again: Core) -> Tensor:
        ctx.save_for_backward(x)
        ctx.again = again
        return first(x.detach())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.again(x)
        torch.autograd.backward(y, dy)
        return x.grad, None, None
