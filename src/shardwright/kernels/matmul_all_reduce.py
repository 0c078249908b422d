"""`matmul_all_reduce`: the operator in which a row-parallel layer ends; this file says which implementation runs.

Also its gradients, so that an implementation only goes forward. What is refused is `operands`' business.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwright.comm.group import Group
from shardwright.kernels import chunked, fused_reference, gradients
from shardwright.kernels.cpu import weight_quant
from shardwright.kernels.cuda import symmetric
from shardwright.kernels.npu import mm_all_reduce
from shardwright.kernels.operands import Antiquant, Dequant, Given, Operands, check
from shardwright.kernels.select import select_for

Implementation = Callable[[Operands, Group], Tensor]

IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": fused_reference.matmul_all_reduce,
    "chunked": chunked.matmul_all_reduce,
    "strips": weight_quant.matmul_all_reduce,
    "npu": mm_all_reduce.matmul_all_reduce,
    "symmetric": symmetric.matmul_all_reduce,
}


def matmul_all_reduce(
    x1: Tensor,
    x2: Tensor,
    group: Group,
    *,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    x3: Tensor | None = None,
    dequant_scale: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    comm_quant_scale_1: Tensor | None = None,
    comm_quant_scale_2: Tensor | None = None,
    comm_turn: int = 0,
    antiquant_group_size: int = 0,
    tag: str = "",
) -> Tensor:
    """Multiply, then sum over the ranks; the contract of `torch_npu.npu_mm_all_reduce_base`, with a `Group` for hcom.

    ============  ====  ====  ===========================================================================
    mode          x1    x2    result: all_reduce of
    ============  ====  ====  ===========================================================================
    plain         F     F     x1 @ x2 + bias + x3
    weight-quant  F     I     x1 @ ((x2 + antiquant_offset) * antiquant_scale) + bias + x3
    full-quant    int8  int8  dequant_scale * (x1 @ x2 + bias) + x3
    per-token     int8  int8  dequant_scale * pertoken_scale * (x1 @ x2 + bias) + x3
    int8-wire     int8  int8  either, sent as int8: / comm_quant_scale_1, summed, / and * comm_quant_scale_2
    ============  ====  ====  ===========================================================================

    F: bfloat16, float16, float32 or float64 · I: int8, or int32 words of eight int4 (`quant.pack_int4`).
    x1 `[m, k_r]` or `[b, s, k_r]` · x2 `[k_r, n]`, a transposed view too · bias `[n]`, int32 with int8 x1 · x3 like the
    output · antiquant_* like x1: `[1]`, `[n]`, `[1, n]`, or `[ceil(k/g), n]` with g = antiquant_group_size ·
    dequant_scale `[1]`, `[n]`, `[1, n]`: bfloat16, `pack_dequant_scale`'s, or float32 beside pertoken_scale ·
    pertoken_scale float32 `[m]` · comm_quant_scale_* `[n]`, `[1, n]`, positive, alike on all ranks.

    The output is `x1.shape[:-1] + (n,)`, alike on every rank, of x1's dtype; with int8 x1 it is bfloat16 where
    dequant_scale is, else float16. bias and x3 are added *before* the reduce, so they count once a rank that passes
    them. comm_turn: into how many pieces to cut the product, each reduced while the next one multiplies (`chunked`; at
    most as many as the dim cut is long), alike on all ranks; 0 leaves it to `select`'s table. Differentiable where x1
    floats, in x1, bias, x3 and a floating x2; the backward moves nothing.

    Raises:
        UsageError: the contract is broken; see `operands`.
        UnsupportedError: dtypes of no mode, or a gradient asked of a quantised input.
    """
    antiquant = Antiquant(antiquant_scale, antiquant_offset, antiquant_group_size)
    dequant = Dequant(dequant_scale, pertoken_scale, comm_quant_scale_1, comm_quant_scale_2)
    operands = check(Given(x1, x2, bias, x3, antiquant, dequant, reduce_op, comm_turn, tag))
    if not gradients.wanted(x1, x2, bias, x3):
        return _forward(operands, group)
    result: Tensor = _MatmulAllReduce.apply(x1, x2, bias, x3, operands, group)  # type: ignore[no-untyped-call]
    return result


def _forward(operands: Operands, group: Group) -> Tensor:
    name = select_for("matmul_all_reduce", operands.x1, group, operands.elements, operands.mode, operands.turns)
    return IMPLEMENTATIONS[name](operands, group)


class _MatmulAllReduce(torch.autograd.Function):
    """The product of either floating mode; the gradient of the sum is that of each rank's part."""

    @staticmethod
    def forward(
        ctx: Any,
        x1: Tensor,
        x2: Tensor,
        bias: Tensor | None,
        x3: Tensor | None,
        operands: Operands,
        group: Group,
    ) -> Tensor:
        ctx.save_for_backward(x1 if ctx.needs_input_grad[1] else None, x2)
        ctx.quant = operands.quant
        return _forward(operands, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2 = ctx.saved_tensors
        return (*gradients.of_product(x1, x2, ctx.quant, dy, ctx.needs_input_grad), None, None)
