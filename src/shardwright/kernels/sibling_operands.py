"""What a call of one of `matmul_all_reduce`'s siblings says, checked, as `operands` does for the operator itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from torch import Tensor

from shardwright.comm.group import Group, name_of
from shardwright.errors import UnsupportedError, UsageError
from shardwright.kernels.operands import (
    FLOATS,
    INFERENCE,
    Operands,
    check_addend,
    check_bias,
    check_like,
    check_product,
    refuse_gradients,
)
from shardwright.kernels.quant import FullQuant
from shardwright.layout.partition import Partition


@dataclass(frozen=True)
class ShareOperands:
    """A checked matmul of which every rank has some rows before or after: x1 `[m, k]`, x2 `[k, n]`.

    sizes: the rows of each rank. bias `[n]` and x3 (like the product) are added before anything is reduced.
    """

    x1: Tensor
    x2: Tensor
    bias: Tensor | None
    x3: Tensor | None
    sizes: tuple[int, ...]
    tag: str

    @property
    def elements(self) -> int:
        """Elements of the whole product."""
        return sum(self.sizes) * self.x2.shape[1]


@dataclass(frozen=True)
class NormOperands:
    """A checked product of `matmul_all_reduce`, the residual added to it, and the scale of the norm."""

    product: Operands
    residual: Tensor
    gamma: Tensor
    eps: float


def check_all_gather(
    x1: Tensor, x2: Tensor, group: Group, sizes: Sequence[int] | None, bias: Tensor | None, tag: str
) -> ShareOperands:
    """Of `all_gather_matmul`: x1 is this rank's rows."""
    _check_matrices(x1, x2)
    rows = [len(x1)] * group.size if sizes is None else sizes
    _check_sizes(rows, group)
    if rows[group.rank] != len(x1):
        constraint = f"sizes gives rank {group.rank} {rows[group.rank]} rows"
        raise UsageError("x1", list(x1.shape), constraint, "pass every rank's rows in sizes")
    check_bias(bias, x1.dtype, x2.shape[1])
    return ShareOperands(x1, x2, bias, None, tuple(rows), tag)


def check_reduce_scatter(
    x1: Tensor,
    x2: Tensor,
    group: Group,
    sizes: Sequence[int] | None,
    bias: Tensor | None,
    x3: Tensor | None,
    tag: str,
) -> ShareOperands:
    """Of `matmul_reduce_scatter`: x1 has all rows, and some of the columns."""
    _check_matrices(x1, x2)
    rows = Partition.balanced(len(x1), group.size).widths if sizes is None else sizes
    _check_sizes(rows, group)
    if sum(rows) != len(x1):
        raise UsageError("sizes", list(rows), f"they sum to x1's {len(x1)} rows", "leave sizes out to cut evenly")
    check_bias(bias, x1.dtype, x2.shape[1])
    check_addend(x3, x1.dtype, (len(x1), x2.shape[1]))
    return ShareOperands(x1, x2, bias, x3, tuple(rows), tag)


def check_norm(product: Operands, residual: Tensor, gamma: Tensor, eps: float) -> NormOperands:
    """Of `matmul_all_reduce_add_rms_norm`: residual is like the output, gamma one value a column."""
    check_addend(residual, product.dtype, product.shape, "residual")
    check_like("gamma", gamma, (product.dtype,), [[product.shape[-1]]])
    if isinstance(product.quant, FullQuant):
        refuse_gradients({"residual": residual, "gamma": gamma}, INFERENCE)
    if not (isfinite(eps) and eps >= 0):
        raise UsageError("eps", eps, "finite and not negative", "use 1e-6")
    return NormOperands(product, residual, gamma, eps)


def _check_matrices(x1: Tensor, x2: Tensor) -> None:
    for name, x, shape in (("x1", x1, "[m, k]"), ("x2", x2, "[k, n]")):
        if x.dim() != 2:
            raise UsageError(name, list(x.shape), f"{name} is {shape}", "flatten it to two dims")
        if x.dtype not in FLOATS:
            message = f"{name}={name_of(x.dtype)}: quantised operands are for matmul_all_reduce; dequantise it first"
            raise UnsupportedError(message)
    check_product(x1, x2)


def _check_sizes(sizes: Sequence[int], group: Group) -> None:
    if len(sizes) != group.size or min(sizes) < 0:
        constraint = f"one number of rows, not negative, for each of {group.size} ranks"
        raise UsageError("sizes", list(sizes), constraint, "fix sizes")
