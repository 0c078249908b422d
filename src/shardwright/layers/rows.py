"""How the rows of the residual stream lie on the ranks in a step: `WholeRows`, or `SharedRows` (sequence parallelism).

Between the parallel blocks of a model lie norms, residual additions and dropout. With `WholeRows` every rank does all
of that on all T rows; with `SharedRows` each on its own T_r, in balance, T a multiple of nothing. A block is entered by
column-parallel products and left by row-parallel ones, so these are the two places where the kinds differ:

==========  =============================  ============================================
kind        entering a block               leaving it
==========  =============================  ============================================
WholeRows   nothing moves                  all-reduce of T x H
SharedRows  all-gather of T x H            reduce-scatter of T x H
==========  =============================  ============================================

The backward of entering is that of leaving, forward, and the other way round. Parameters that act on shared rows have
partial gradients (`gradient`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor

from shardwright.comm import regions
from shardwright.comm.group import Group
from shardwright.kernels.column_linear import Product, copied_linears, gathered_linears
from shardwright.kernels.matmul_all_reduce import matmul_all_reduce
from shardwright.kernels.row_linear import Term, unsummed_linears
from shardwright.kernels.siblings import matmul_reduce_scatter
from shardwright.layout.partition import Partition, Range
from shardwright.layout.spec import Gradient


class Rows(ABC):
    """Which rows of the residual stream each rank holds, and what it takes to enter and to leave a block."""

    gradient: ClassVar[Gradient]

    @abstractmethod
    def enter(self, x: Tensor, products: Sequence[Product], group: Group, tag: str) -> tuple[Tensor, ...]:
        """This rank's columns of all rows, `[T, O_r]` of each product; `x` as it lies in the residual stream.

        The products read one `x [T, I]`, or the parts of an `x [T, n I]` in turn; what moves is one x.
        """

    @abstractmethod
    def leave(self, terms: Sequence[Term], group: Group, tag: str) -> Tensor:
        """The sum over ranks and terms of `x [T, I_r] @ weight.T`, as it lies in the residual stream, in one move."""

    @abstractmethod
    def total(self, x: Tensor, group: Group, tag: str) -> Tensor:
        """The sum over ranks of `x [T, H]`, as it lies in the residual stream: what an embedding ends in."""

    @abstractmethod
    def again(self) -> "Rows":
        """The same for a recomputation: what leaves a block has gradients and no values, and is not summed again."""

    @abstractmethod
    def mine(self, tokens: int, rank: int) -> Range:
        """Which of `tokens` rows a rank holds."""


@dataclass(frozen=True)
class WholeRows(Rows):
    """Every rank holds all rows, alike. again: this is a recomputation."""

    gradient: ClassVar[Gradient] = "whole"
    repeated: bool = False

    @final
    def enter(self, x: Tensor, products: Sequence[Product], group: Group, tag: str) -> tuple[Tensor, ...]:
        """Nothing moves."""
        return copied_linears(x, products, group, tag)

    @final
    def leave(self, terms: Sequence[Term], group: Group, tag: str) -> Tensor:
        """One all-reduce."""
        if self.repeated:
            return unsummed_linears(terms, None, group, tag)
        (x, weight), *others = terms
        return matmul_all_reduce(x, weight.T, group, x3=_summed(others), tag=tag)

    @final
    def total(self, x: Tensor, group: Group, tag: str) -> Tensor:
        """One all-reduce."""
        return regions.reduce(x, group, tag)

    @final
    def again(self) -> "WholeRows":
        """Without the all-reduce of leaving."""
        return WholeRows(repeated=True)

    @final
    def mine(self, tokens: int, rank: int) -> Range:
        """All of them."""
        return 0, tokens


@dataclass(frozen=True)
class SharedRows(Rows):
    """Each rank holds `sizes[rank]` rows, zero allowed."""

    gradient: ClassVar[Gradient] = "partial"
    sizes: tuple[int, ...]
    repeated: bool = False

    @classmethod
    def balanced(cls, tokens: int, ranks: int) -> "SharedRows":
        """Rows dealt out evenly, the remainder one each to the first ranks."""
        return cls(Partition.balanced(tokens, ranks).widths)

    @final
    def enter(self, x: Tensor, products: Sequence[Product], group: Group, tag: str) -> tuple[Tensor, ...]:
        """One all-gather."""
        return gathered_linears(x, products, self.sizes, group, tag)

    @final
    def leave(self, terms: Sequence[Term], group: Group, tag: str) -> Tensor:
        """One reduce-scatter."""
        if self.repeated:
            return unsummed_linears(terms, self.sizes, group, tag)
        (x, weight), *others = terms
        return matmul_reduce_scatter(x, weight.T, group, sizes=self.sizes, x3=_summed(others), tag=tag)

    @final
    def total(self, x: Tensor, group: Group, tag: str) -> Tensor:
        """One reduce-scatter."""
        return regions.sequence_scatter(x, self.sizes, group, tag)

    @final
    def again(self) -> "SharedRows":
        """Without the reduce-scatter of leaving; entering gathers again, as only this rank's rows were kept."""
        return SharedRows(self.sizes, repeated=True)

    @final
    def mine(self, tokens: int, rank: int) -> Range:
        """This rank's range of the deal."""
        start = sum(self.sizes[:rank])
        return start, start + self.sizes[rank]


def _summed(terms: Sequence[Term]) -> Tensor | None:
    """This rank's part of these terms, to be added to another one before the ranks' sum."""
    products = [F.linear(x, weight) for x, weight in terms]
    return sum(products[1:], products[0]) if products else None


WHOLE = WholeRows()
