"""The fused matmuls in their obviously right torch form: multiply, then let the group move it.

The oracle of every other implementation, and what meta tensors take. Like each of them, these get checked operands and
only go forward: the operators own the gradients. A rank without features passes empty dims.
"""

from collections.abc import Sequence
from math import prod

import torch.nn.functional as F
from torch import Tensor

from shardwright.comm.group import Group
from shardwright.kernels import quant, reference
from shardwright.kernels.operands import Operands
from shardwright.kernels.quant import FullQuant
from shardwright.kernels.sibling_operands import NormOperands, ShareOperands


def matmul_all_reduce(operands: Operands, group: Group) -> Tensor:
    """The five formulas of `kernels.matmul_all_reduce`."""
    match operands.quant:
        case FullQuant(wire=(_, _) as wire) as full:
            return over_int8(dequantised(operands, full), wire, group, operands.tag).to(operands.dtype)
        case _:
            y = partial(operands)
            return group.all_reduce(y, out=y, tag=operands.tag)


def partial(operands: Operands) -> Tensor:
    """What this rank adds to the sum, in the output's type: a new tensor."""
    match operands.quant:
        case FullQuant() as full:
            return dequantised(operands, full).to(operands.dtype)
        case weight:
            return added(operands.x1 @ quant.floating_weight(operands.x2, weight), operands.bias, operands.x3)


def dequantised(operands: Operands, full: FullQuant) -> Tensor:
    """`(x1 @ x2 + bias) * scale * per_token + x3`, float32, left to right.

    The integers are exact: products of int8 and their sums stay far below 2⁵³, and every device multiplies float64,
    which torch's integer matmul does not. float32 then rounds the sum once, as a conversion from int32 would.
    """
    total = added(operands.x1.double() @ operands.x2.double(), operands.bias, None)
    y = total.float() * quant.dequant_scale(full.scale)
    if full.per_token is not None:
        y = y * full.per_token.reshape(*operands.shape[:-1], 1)
    return added(y, None, operands.x3)


def over_int8(partial: Tensor, wire: tuple[Tensor, Tensor], group: Group, tag: str) -> Tensor:
    """The sum over the ranks with int8 on both legs: rows dealt out, summed, gathered again; float32.

    Rows are padded with zeros to a multiple of the ranks. Sums of int8 are exact in float32, in rank order or any. The
    device rounds partial sums to the output's type, and its totals to float16, on the way; neither is in the contract.
    """
    first, second = (scale.float().flatten() for scale in wire)
    rows = leaving(partial, first, group.size)
    even = [len(rows) // group.size] * group.size
    parts = group.all_to_all(rows, even, even, tag=tag)
    whole = group.all_gather(returning(parts, first / second, group.size), 0, even, tag=tag)
    return arrived(whole, second, partial.shape)


def leaving(partial: Tensor, first: Tensor, ranks: int) -> Tensor:
    """What the first leg carries: `[…, n]` → int8 rows, padded to a multiple of the ranks."""
    rows = partial.flatten(0, -2)
    return F.pad(quant.quantise_int8(rows / first), (0, 0, 0, -len(rows) % ranks))


def returning(parts: Tensor, rescale: Tensor, ranks: int) -> Tensor:
    """What the second leg carries: this rank's rows of all ranks, below each other → their sum as int8."""
    total = parts.reshape(ranks, len(parts) // ranks, parts.shape[1]).float().sum(0)
    return quant.quantise_int8(total * rescale)


def arrived(whole: Tensor, second: Tensor, shape: Sequence[int]) -> Tensor:
    """The float32 sum `[…, n]` of the rows that came, without the padding."""
    return (whole[: prod(shape[:-1])].float() * second).reshape(shape)


def all_gather_matmul(operands: ShareOperands, group: Group) -> tuple[Tensor, Tensor]:
    """`gathered @ x2 + bias`, and the gathered rows."""
    gathered = group.all_gather(operands.x1, 0, operands.sizes, tag=operands.tag)
    return added(gathered @ operands.x2, operands.bias, None), gathered


def matmul_reduce_scatter(operands: ShareOperands, group: Group) -> Tensor:
    """This rank's rows of the sum of all ranks' `x1 @ x2 + bias + x3`."""
    partial = added(operands.x1 @ operands.x2, operands.bias, operands.x3)
    return group.reduce_scatter(partial, 0, operands.sizes, tag=operands.tag)


def matmul_all_reduce_add_rms_norm(operands: NormOperands, group: Group) -> tuple[Tensor, Tensor]:
    """`rms_norm(y, gamma)` and `y = matmul_all_reduce(…) + residual`."""
    return normed(matmul_all_reduce(operands.product, group), operands)


def normed(reduced: Tensor, operands: NormOperands) -> tuple[Tensor, Tensor]:
    """The norm of `reduced + residual`, and that sum."""
    y = reduced + operands.residual
    return reference.rms_norm(y, operands.gamma, operands.eps), y


def added(y: Tensor, bias: Tensor | None, x3: Tensor | None) -> Tensor:
    """`y + bias + x3`, what there is of it."""
    y = y if bias is None else y + bias
    return y if x3 is None else y + x3
