"""`matmul_all_reduce` with a float32 x1 and a weight of int8 or int4, on CPUs: the weight is never whole as floats.

Decides how a weight lies in memory, whether few rows meet it directly or a BLAS gets strips of it, and how wide those
are. The loops are `kernels.cpu.strips`'; the sum over the ranks is the group's. Knows no kind of group.
"""

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardwright.comm.group import Group
from shardwright.kernels.fused_reference import added
from shardwright.kernels.operands import Operands
from shardwright.kernels.quant import WeightQuant

FEW = 8
"""Rows up to which they meet the weight as it is read; with 16 a BLAS over strips is as fast (benchmarks/NOTES.md)."""

MANY = 512
"""Rows above which a strip is broad: packing them anew for each strip is then what costs."""

NARROW, BROAD = 128, 2048
"""Columns of a strip: one that a BLAS finds again in a core's second cache, or one for many rows. Time over a bare
product of float32, K 1024 and 2732: 0.95 to 1.02 for 64 and 256 rows, 1.03 for 1024 (two Xeon cores)."""


@dataclass(frozen=True)
class Stored:
    """A weight `[k, n]` as it lies in memory. across: rows lie along n; else it is transposed, and they lie along k.

    described: what compiled code needs, by `strips`' fields · held: the tensors that it has the addresses of.
    """

    across: bool
    described: NDArray[np.int64]
    held: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, x2: Tensor, weight: WeightQuant, k: int, n: int) -> "Stored":
        """Only a weight in which no dim is contiguous is copied."""
        from shardwright.kernels.cpu import integers, strips  # imports numba

        across = x2.stride(1) == 1 or x2.stride(0) != 1
        rows = x2 if across else x2.T
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        group = weight.group_size or k
        shape = -(-k // group), n
        scale = weight.scale.expand(shape).contiguous()
        offset = scale.new_zeros(shape) if weight.offset is None else weight.offset.expand(shape).contiguous()
        forms = {None: integers.BYTES, "n" if across else "k": integers.NIBBLES}
        described = np.zeros(strips.FIELDS, np.int64)
        described[:] = (
            rows.data_ptr(),
            rows.stride(0) * rows.itemsize,
            forms.get(weight.packed, integers.STACKED),
            k,
            n,
            group,
            scale.data_ptr(),
            offset.data_ptr(),
        )
        return cls(across, described, (rows, scale, offset))


def matmul_all_reduce(operands: Operands, group: Group) -> Tensor:
    """As the reference. Scales may join the sum of a group's products instead of each weight: equal to rounding."""
    weight = operands.quant
    assert isinstance(weight, WeightQuant)
    x = operands.x1.flatten(0, -2).contiguous()
    y = product(x, operands.x2, weight, operands.shape[-1]).view(operands.shape)
    y = added(y, operands.bias, operands.x3)
    return group.all_reduce(y, out=y, tag=operands.tag)


def product(x: Tensor, x2: Tensor, weight: WeightQuant, n: int) -> Tensor:
    """`x [m, k] @ weight [k, n]`, float32; x is contiguous."""
    m, k = x.shape
    y = x.new_empty(m, n)
    if not prod((m, k, n)):
        return y.zero_()
    (_meet if m <= FEW else _multiply_strips)(x, Stored.of(x2, weight, k, n), y)
    return y


def _meet(x: Tensor, stored: Stored, y: Tensor) -> None:
    """Few rows meet the weight as it is read."""
    from shardwright.kernels.cpu import strips  # imports numba

    (m, k), groups = x.shape, len(stored.held[1])
    room = np.empty(m * groups + strips.WIDE if stored.across else strips.TALL * (k + m), np.float32)
    multiply = strips.multiply_across if stored.across else strips.multiply_along
    multiply(stored.described, x.numpy(), y.numpy(), room)


def _multiply_strips(x: Tensor, stored: Stored, y: Tensor) -> None:
    """Strips of columns are laid out as floats, and a BLAS multiplies each."""
    from shardwright.kernels.cpu import strips  # imports numba

    (m, k), n = x.shape, y.shape[1]
    width = BROAD if m > MANY else NARROW
    strip = x.new_empty(k * min(width, n))
    lay = strips.strip_across if stored.across else strips.strip_along
    for start in range(0, n, width):
        stop = min(start + width, n)
        lay(stored.described, start, stop, strip.data_ptr())
        part = strip[: k * (stop - start)]
        floating = part.view(k, stop - start) if stored.across else part.view(stop - start, k).T
        torch.mm(x, floating, out=y[:, start:stop])
