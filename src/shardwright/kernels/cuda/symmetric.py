"""Products fused with communication by torch's symmetric-memory operators, where the build and the links have them.

Unproven: never run on such devices. Whether they can run is asked at each call (`comm.symmetric`), since they import
and resolve everywhere.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardwright.comm.group import Group
from shardwright.comm.symmetric import why_not_symmetric
from shardwright.comm.torch_group import TorchGroup
from shardwright.errors import UsageError
from shardwright.kernels import fused_reference
from shardwright.kernels.fused import instead
from shardwright.kernels.operands import Operands


def fused_matmul_reduce_scatter(
    x1: Tensor,
    x2: Tensor,
    group: Group,
    *,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    tag: str = "",
    unfused: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Rows `m / R` of this rank of the sum of all ranks' `x1 [m, k_r] @ x2 [k_r, n] + bias`; m is a multiple of R.

    unfused: what runs where the operator cannot, with the same arguments; a warning says why.

    Raises:
        UnsupportedError: it cannot, without `unfused`.
        UsageError: another `reduce_op` than sum.
    """
    _check_sum(reduce_op)
    reason = _why_not(x1, group) or _why_not_scattered(x1, bias, group)
    if reason is not None:
        other = instead("fused_matmul_reduce_scatter", reason, unfused)
        return other(x1, x2, group, reduce_op=reduce_op, bias=bias, tag=tag)
    y: Tensor = torch.ops.symm_mem.fused_matmul_reduce_scatter(x1, x2, reduce_op, 0, _name(group))
    return y


def fused_all_gather_matmul(
    x1: Tensor,
    x2: Tensor,
    group: Group,
    *,
    bias: Tensor | None = None,
    gather_index: int = 0,
    gather_output: bool = True,
    tag: str = "",
    unfused: Callable[..., tuple[Tensor, Tensor | None]] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`(x @ x2 + bias, x)` with `x [m R, k]` the ranks' `x1 [m, k]` in rank order; x is None without `gather_output`.

    unfused: what runs where the operator cannot, with the same arguments; a warning says why.

    Raises:
        UnsupportedError: it cannot, without `unfused`.
        UsageError: another `gather_index` than 0: x2 is never gathered.
    """
    if gather_index:
        raise UsageError("gather_index", gather_index, "x1 is gathered, never x2", "use 0")
    reason = _why_not(x1, group)
    if reason is not None:
        other = instead("fused_all_gather_matmul", reason, unfused)
        return other(x1, x2, group, bias=bias, gather_index=gather_index, gather_output=gather_output, tag=tag)
    name = _name(group)
    x, (y,) = torch.ops.symm_mem.fused_all_gather_matmul(x1, [x2], 0, name, return_A=gather_output)
    return y if bias is None else y + bias, x


def fused_matmul_all_reduce(
    x1: Tensor,
    x2: Tensor,
    group: Group,
    *,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    x3: Tensor | None = None,
    tag: str = "",
    unfused: Callable[..., Tensor] | None = None,
) -> Tensor:
    """`all_reduce(x1 @ x2 + bias + x3)`: torch has no such operator, so rows are reduced as they come, then gathered.

    x1 `[m, k_r]` with m a multiple of R · x2 `[k_r, n]`. bias and x3 are what `unfused` is for.

    Raises:
        UnsupportedError: it cannot run here or so, without `unfused`.
        UsageError: another `reduce_op` than sum.
    """
    _check_sum(reduce_op)
    reason = _why_not(x1, group) or _why_not_scattered(x1, bias if x3 is None else x3, group)
    if reason is not None:
        other = instead("fused_matmul_all_reduce", reason, unfused)
        return other(x1, x2, group, reduce_op=reduce_op, bias=bias, x3=x3, tag=tag)
    rows: Tensor = torch.ops.symm_mem.fused_matmul_reduce_scatter(x1, x2, reduce_op, 0, _name(group))
    return group.all_gather(rows, 0, [len(rows)] * group.size, tag=tag)


def matmul_all_reduce(operands: Operands, group: Group) -> Tensor:
    """A row of `select`'s table, for the plain mode: as the reference, which runs where the operator cannot."""

    def unfused(*arguments: Any, **options: Any) -> Tensor:
        return fused_reference.matmul_all_reduce(operands, group)

    x1, x3 = operands.x1.flatten(0, -2), None if operands.x3 is None else operands.x3.flatten(0, -2)
    y = fused_matmul_all_reduce(x1, operands.x2, group, bias=operands.bias, x3=x3, tag=operands.tag, unfused=unfused)
    return y.view(operands.shape)


def _check_sum(reduce_op: str) -> None:
    if reduce_op != "sum":
        raise UsageError("reduce_op", reduce_op, "only a sum distributes over the split matmul", "use 'sum'")


def _why_not(x1: Tensor, group: Group) -> str | None:
    if torch.is_grad_enabled() and x1.requires_grad:
        return "the fused operator has no gradient"
    if x1.dim() != 2 or not x1.numel():
        return f"x1 is {list(x1.shape)}, not [m, k]"
    return why_not_symmetric(group)


def _why_not_scattered(x1: Tensor, added: Tensor | None, group: Group) -> str | None:
    if len(x1) % group.size:
        return f"{len(x1)} rows do not divide by {group.size} ranks"
    return None if added is None else "the fused operator adds nothing before the reduce"


def _name(group: Group) -> str:
    assert isinstance(group, TorchGroup)
    return group.name
