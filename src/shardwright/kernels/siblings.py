"""The fused matmuls beside `matmul_all_reduce`: rows gathered before, rows scattered after, a norm at the end.

Says which implementation runs, and owns the gradients, each built from the others: the backward of a gather is a
scatter. Quantised operands are `matmul_all_reduce`'s, and the norm's, which contains it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwright.comm.group import Group
from shardwright.errors import UsageError
from shardwright.kernels import chunked, fused_reference, gradients, reference
from shardwright.kernels.operands import Antiquant, Dequant, Given, check
from shardwright.kernels.select import Kernel, select_for
from shardwright.kernels.sibling_operands import (
    NormOperands,
    ShareOperands,
    check_all_gather,
    check_norm,
    check_reduce_scatter,
)

GATHER: dict[str, Callable[[ShareOperands, Group], tuple[Tensor, Tensor]]] = {
    "reference": fused_reference.all_gather_matmul
}
SCATTER: dict[str, Callable[[ShareOperands, Group], Tensor]] = {"reference": fused_reference.matmul_reduce_scatter}
NORM: dict[str, Callable[[NormOperands, Group], tuple[Tensor, Tensor]]] = {
    "reference": fused_reference.matmul_all_reduce_add_rms_norm,
    "chunked": chunked.matmul_all_reduce_add_rms_norm,
}


def all_gather_matmul(
    x1: Tensor,
    x2: Tensor,
    group: Group,
    *,
    sizes: Sequence[int] | None = None,
    bias: Tensor | None = None,
    tag: str = "",
) -> tuple[Tensor, Tensor]:
    """Join all ranks' rows, then multiply: `(gathered @ x2 + bias, gathered)` with `gathered = all_gather(x1)`.

    x1 `[m_r, k]`, this rank's rows · x2 `[k, n_r]` of x1's dtype, a transposed view too · bias `[n_r]` · sizes: the
    rows of all ranks, zeros allowed; without it every rank has as many as this one. The outputs are `[sum m_r, n_r]`
    and `[sum m_r, k]`, of x1's dtype. The formula is `torch_npu.npu_all_gather_base_mm`'s (Ascend/op-plugin), where all
    ranks have the same number of rows.

    Differentiable: both outputs count as this rank's own, so the gradient of x1 is summed over the ranks, by one
    `matmul_reduce_scatter`; those of x2 and bias move nothing.

    Raises:
        UsageError: not 2-D, k or dtypes differ, bias is not `[n_r]`, sizes do not fit the group or x1.
        UnsupportedError: x1 or x2 is not floating.
    """
    operands = check_all_gather(x1, x2, group, sizes, bias, tag)
    if not gradients.wanted(x1, x2, bias):
        return _gather(operands, group)
    result: tuple[Tensor, Tensor] = _AllGatherMatmul.apply(x1, x2, bias, operands, group)  # type: ignore[no-untyped-call]
    return result


def matmul_reduce_scatter(
    x1: Tensor,
    x2: Tensor,
    group: Group,
    *,
    reduce_op: str = "sum",
    sizes: Sequence[int] | None = None,
    bias: Tensor | None = None,
    x3: Tensor | None = None,
    tag: str = "",
) -> Tensor:
    """Multiply, sum over the ranks, keep this rank's rows: `reduce_scatter(x1 @ x2 + bias + x3)`.

    x1 `[m, k_r]` · x2 `[k_r, n]` of x1's dtype, a transposed view too · bias `[n]` and x3 `[m, n]`, added before the
    reduce, so that they count once a rank that passes them · sizes: the rows of all ranks, zeros allowed; balanced by
    default. The output is `[sizes[rank], n]`, of x1's dtype. The formula is `torch_npu.npu_mm_reduce_scatter_base`'s
    (Ascend/op-plugin), which has no x3 and wants m to be a multiple of the ranks.

    Differentiable: one `all_gather_matmul` gives the gradient of x1 and, with its gathered rows, all others.

    Raises:
        UsageError: not 2-D, k or dtypes differ, bias is not `[n]`, x3 not `[m, n]`, sizes do not fit the group or x1,
            another `reduce_op` than sum.
        UnsupportedError: x1 or x2 is not floating.
    """
    if reduce_op != "sum":
        raise UsageError("reduce_op", reduce_op, "only a sum distributes over the split matmul", "use 'sum'")
    operands = check_reduce_scatter(x1, x2, group, sizes, bias, x3, tag)
    if not gradients.wanted(x1, x2, bias, x3):
        return _scatter(operands, group)
    result: Tensor = _MatmulReduceScatter.apply(x1, x2, bias, x3, operands, group)  # type: ignore[no-untyped-call]
    return result


def matmul_all_reduce_add_rms_norm(
    x1: Tensor,
    x2: Tensor,
    residual: Tensor,
    gamma: Tensor,
    group: Group,
    *,
    reduce_op: str = "sum",
    eps: float = 1e-6,
    bias: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    dequant_scale: Tensor | None = None,
    antiquant_group_size: int = 0,
    comm_turn: int = 0,
    tag: str = "",
) -> tuple[Tensor, Tensor]:
    """`matmul_all_reduce`, plus a residual, normalised: `(y / sqrt(mean(y²) + eps) * gamma, y)`.

    `y = matmul_all_reduce(x1, x2, bias=bias, …) + residual`: the residual is added *after* the reduce, so that every
    rank passes the same one. residual is like the output, gamma `[n]` of its dtype; all else is as `matmul_all_reduce`
    has it. Both outputs are of its shape and dtype, alike on every rank; the norm is computed in float32 for half
    types. Formula and arguments are those of MindSpeed's `npu_mm_all_reduce_add_rms_norm`, which calls eps epsilon and
    returns y first.

    Differentiable where x1 floats, in gamma and residual too; the backward moves nothing.

    Raises:
        UsageError: as `matmul_all_reduce`; residual is not like the output, gamma not `[n]`, eps negative.
        UnsupportedError: as `matmul_all_reduce`; a gradient asked with int8 operands.
    """
    antiquant = Antiquant(antiquant_scale, antiquant_offset, antiquant_group_size)
    given = Given(x1, x2, bias, None, antiquant, Dequant(dequant_scale), reduce_op, comm_turn, tag)
    operands = check_norm(check(given), residual, gamma, eps)
    if not gradients.wanted(x1, x2, bias, residual, gamma):
        return _norm(operands, group)
    inputs = (x1, x2, bias, residual, gamma)
    result: tuple[Tensor, Tensor] = _AddRmsNorm.apply(*inputs, operands, group)  # type: ignore[no-untyped-call]
    return result


# ---- which implementation


def _gather(operands: ShareOperands, group: Group) -> tuple[Tensor, Tensor]:
    return GATHER[select_for("all_gather_matmul", operands.x1, group, operands.elements)](operands, group)


def _scatter(operands: ShareOperands, group: Group) -> Tensor:
    return SCATTER[select_for("matmul_reduce_scatter", operands.x1, group, operands.elements)](operands, group)


def _norm(operands: NormOperands, group: Group) -> tuple[Tensor, Tensor]:
    product = operands.product
    kernel: Kernel = "matmul_all_reduce_add_rms_norm"
    name = select_for(kernel, product.x1, group, product.elements, product.mode, product.turns)
    return NORM[name](operands, group)


# ---- gradients


class _AllGatherMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x1: Tensor, x2: Tensor, bias: Tensor | None, operands: ShareOperands, group: Group
    ) -> tuple[Tensor, Tensor]:
        y, gathered = _gather(operands, group)
        ctx.save_for_backward(gathered if ctx.needs_input_grad[1] else None, x2)
        ctx.group, ctx.sizes, ctx.tag = group, operands.sizes, f"{operands.tag}/grad"
        return y, gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dgathered: Tensor) -> tuple[Tensor | None, ...]:
        gathered, x2 = ctx.saved_tensors
        dx1 = None
        if ctx.needs_input_grad[0]:
            dx1 = matmul_reduce_scatter(dy, x2.T, ctx.group, sizes=ctx.sizes, x3=dgathered, tag=ctx.tag)
        dx2 = gradients.of_right(gathered, dy, x2) if ctx.needs_input_grad[1] else None
        return dx1, dx2, gradients.of_bias(dy) if ctx.needs_input_grad[2] else None, None, None


class _MatmulReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x1: Tensor,
        x2: Tensor,
        bias: Tensor | None,
        x3: Tensor | None,
        operands: ShareOperands,
        group: Group,
    ) -> Tensor:
        ctx.save_for_backward(x1 if ctx.needs_input_grad[1] else None, x2)
        ctx.group, ctx.sizes, ctx.tag = group, operands.sizes, f"{operands.tag}/grad"
        return _scatter(operands, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2 = ctx.saved_tensors
        dx1, whole = all_gather_matmul(dy, x2.T, ctx.group, sizes=ctx.sizes, tag=ctx.tag)
        _, *others = gradients.of_product(x1, x2, None, whole, (False, *ctx.needs_input_grad[1:4]))
        return dx1, *others, None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x1: Tensor,
        x2: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        gamma: Tensor,
        operands: NormOperands,
        group: Group,
    ) -> tuple[Tensor, Tensor]:
        norm, y = _norm(operands, group)
        ctx.save_for_backward(x1 if ctx.needs_input_grad[1] else None, x2, gamma, y)
        ctx.quant, ctx.eps = operands.product.quant, operands.eps
        return norm, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnorm: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2, gamma, y = ctx.saved_tensors
        with torch.enable_grad():
            leaves = y.detach().requires_grad_(), gamma.detach().requires_grad_()
            norm = reference.rms_norm(*leaves, ctx.eps)
        through_norm, dgamma = torch.autograd.grad(norm, leaves, dnorm)
        needed = ctx.needs_input_grad
        product = gradients.of_product(x1, x2, ctx.quant, dy + through_norm, needed[:4])
        return *product, dgamma, None, None
