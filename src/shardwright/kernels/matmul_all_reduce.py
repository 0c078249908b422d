"""`matmul_all_reduce`: the operator in which a row-parallel layer ends; this file owns its contract and refusals."""

from torch import Tensor

from shardwright.comm.group import Group, name_of
from shardwright.errors import UsageError
from shardwright.kernels import reference
from shardwright.kernels.select import select

IMPLEMENTATIONS = {"reference": reference.matmul_all_reduce}


def matmul_all_reduce(
    x1: Tensor,
    x2: Tensor,
    group: Group,
    *,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    x3: Tensor | None = None,
    tag: str = "",
) -> Tensor:
    """Multiply, then sum over the ranks: `all_reduce(x1 @ x2 + bias + x3)`.

    x1 `[m, k_r]` or `[b, s, k_r]` · x2 `[k_r, n]`, a transposed view too, of x1's dtype · bias `[n]` · x3 like the
    output. The output is `x1.shape[:-1] + (n,)`, alike on every rank. Differentiable; the backward moves nothing.

    bias and x3 are added *before* the reduce: passed on every rank they are summed once a rank. Who calls this by hand
    passes them on rank 0 only. This is the plain mode of `torch_npu.npu_mm_all_reduce_base`, whose contract it follows
    (Ascend/op-plugin documentation); its quantised modes are not built yet.

    Raises:
        UsageError: x2 is not 2-D, k differs, dtypes differ, x3 is not like the output, another `reduce_op` than sum.
    """
    if reduce_op != "sum":
        raise UsageError("reduce_op", reduce_op, "only a sum distributes over the split matmul", "use 'sum'")
    _check(x1, x2, bias, x3)
    implementation = IMPLEMENTATIONS[select("matmul_all_reduce", x1.device.type, x1.dtype)]
    return implementation(x1, x2, group, bias=bias, x3=x3, tag=tag)


def _check(x1: Tensor, x2: Tensor, bias: Tensor | None, x3: Tensor | None) -> None:
    if x2.dim() != 2:
        raise UsageError("x2", list(x2.shape), "x2 is [k, n]", "flatten it to two dims")
    if x1.dim() not in (2, 3) or x1.shape[-1] != x2.shape[0]:
        raise UsageError("x1", list(x1.shape), f"x1 is [m, k] or [b, s, k] with k = {x2.shape[0]}", "match x2's rows")
    if x1.dtype != x2.dtype:
        raise UsageError("x2", name_of(x2.dtype), f"x1 is {name_of(x1.dtype)}", "convert one of them")
    if bias is not None and (bias.shape != x2.shape[1:] or bias.dtype != x1.dtype):
        raise UsageError("bias", _kind(bias), f"bias is {name_of(x1.dtype)} [{x2.shape[1]}]", "pass one like that")
    output = (*x1.shape[:-1], x2.shape[1])
    if x3 is not None and (x3.shape != output or x3.dtype != x1.dtype):
        constraint = f"x3 is like the output, {name_of(x1.dtype)} {list(output)}"
        raise UsageError("x3", _kind(x3), constraint, "pass one like that")


def _kind(x: Tensor) -> str:
    return f"{name_of(x.dtype)} {list(x.shape)}"
