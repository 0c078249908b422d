"""What a call of the fused matmuls says, checked: every refusal of the published contract is in this file.

`Given` is the call as it was made; `check` refuses it or turns it into `Operands`, in which nothing contradicts and
nothing is missing. Implementations get `Operands` and check nothing. Knows nothing of how anything is computed.

The contract is that of `torch_npu.npu_mm_all_reduce_base` (Ascend/op-plugin, its documentation and its wrapper's
checks). What only the device cannot do is not refused here: empty shares, float32 and float64, a packed scale beside
pertoken_scale, more ranks than 8.
"""

from math import ceil, prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shardwright.comm.group import name_of
from shardwright.errors import UnsupportedError, UsageError
from shardwright.kernels.quant import NIBBLES, FullQuant, WeightQuant

Mode = Literal["plain", "weight-quant", "full-quant", "per-token", "int8-wire"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PACKED = (torch.int64, torch.uint64)

INFERENCE = "int8 by int8 is for inference and has no gradients"

Named = dict[str, Tensor | int | None]
"""Arguments by their published names."""


class Antiquant(NamedTuple):
    """What was passed about the quantisation of the weight alone."""

    scale: Tensor | None = None
    offset: Tensor | None = None
    group_size: int = 0

    def named(self) -> Named:
        """By the published names; a group size of 0 is none."""
        return {
            "antiquant_scale": self.scale,
            "antiquant_offset": self.offset,
            "antiquant_group_size": self.group_size or None,
        }


class Dequant(NamedTuple):
    """What was passed about the quantisation of both factors, and of what travels."""

    scale: Tensor | None = None
    per_token: Tensor | None = None
    wire_1: Tensor | None = None
    wire_2: Tensor | None = None

    def named(self) -> Named:
        """By the published names."""
        return {
            "dequant_scale": self.scale,
            "pertoken_scale": self.per_token,
            "comm_quant_scale_1": self.wire_1,
            "comm_quant_scale_2": self.wire_2,
        }


class Given(NamedTuple):
    """A call of the operator as it was made."""

    x1: Tensor
    x2: Tensor
    bias: Tensor | None
    x3: Tensor | None
    antiquant: Antiquant
    dequant: Dequant
    reduce_op: str
    comm_turn: int
    tag: str


class Operands(NamedTuple):
    """A checked call: x1 `[m, k_r]` or `[b, s, k_r]`, x2 `[k_r, n]`, the output of `dtype` and `shape`.

    turns: into how many pieces to cut; 0 leaves it to the implementation.
    """

    x1: Tensor
    x2: Tensor
    bias: Tensor | None
    x3: Tensor | None
    quant: WeightQuant | FullQuant | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    turns: int
    tag: str

    @property
    def mode(self) -> Mode:
        """Which of the contract's five formulas this is."""
        match self.quant:
            case None:
                return "plain"
            case WeightQuant():
                return "weight-quant"
            case FullQuant(wire=None):
                return "full-quant" if self.quant.per_token is None else "per-token"
            case FullQuant():
                return "int8-wire"

    @property
    def elements(self) -> int:
        """Elements of the output."""
        return prod(self.shape)


def check(given: Given) -> Operands:
    """The call as `Operands`, or a `UsageError` (`UnsupportedError` for what no mode covers) that says what to do."""
    x1, x2 = given.x1, given.x2
    if given.reduce_op != "sum":
        raise UsageError("reduce_op", given.reduce_op, "only a sum distributes over the split matmul", "use 'sum'")
    if given.comm_turn < 0:
        raise UsageError("comm_turn", given.comm_turn, "the number of chunks, or 0", "use 0 to let it be chosen")
    if x2.dim() != 2:
        raise UsageError("x2", list(x2.shape), "x2 is [k, n]", "flatten it to two dims")
    if x1.dim() not in (2, 3):
        raise UsageError("x1", list(x1.shape), "x1 is [m, k] or [b, s, k]", "flatten it to two dims")
    match (x1.dtype in FLOATS, x2.dtype in FLOATS):
        case (True, True):
            return _plain(given)
        case (True, False) if x2.dtype in (torch.int8, torch.int32):
            return _weight_quant(given)
        case (False, False) if x1.dtype == x2.dtype == torch.int8:
            return _full_quant(given)
    raise UnsupportedError(
        f"x1={name_of(x1.dtype)}, x2={name_of(x2.dtype)}: both are floats of one type, or x2 alone is int8 or int4 in "
        "int32 words, or both are int8; convert one of them"
    )


# ---- the modes


def _plain(given: Given) -> Operands:
    check_product(given.x1, given.x2)
    because = f"x1 and x2 are {name_of(given.x1.dtype)}, so nothing is quantised"
    _refuse(given.antiquant.named() | given.dequant.named(), because, "leave it out, or pass an int8 x2")
    return _operands(given, None, given.x1.dtype, given.x2.shape[1])


def _weight_quant(given: Given) -> Operands:
    """A floating x1 over an integer x2: scale and offset like x1, in one of three granularities over `[k, n]`."""
    packed, k, n = _unpacked_shape(given)
    _check_inner(given.x1, k)
    scale, offset, dtype = given.antiquant.scale, given.antiquant.offset, given.x1.dtype
    _refuse(given.dequant.named(), f"x1 is {name_of(dtype)}; this is for an int8 x1", "use antiquant_scale")
    if scale is None:
        raise UsageError("antiquant_scale", None, "an integer x2 under a floating x1 has one", "pass its scale")
    size = given.antiquant.group_size
    shapes = [[1], [n], [1, n]]
    if size:
        # A share without rows has no group to describe, and still enters the reduce: at k = 0 any size will do.
        if size < 0 or size % 32 or 0 < k <= size:
            remedy = "use 0 and a scale for each column, which is one group" if size >= k else "use a multiple of 32"
            raise UsageError("antiquant_group_size", size, f"a multiple of 32 in [32, k − 1], k = {k}", remedy)
        shapes = [[ceil(k / size), n]]
    check_like("antiquant_scale", scale, (dtype,), shapes)
    if offset is not None:
        check_like("antiquant_offset", offset, (dtype,), [list(scale.shape)])
    refuse_gradients(given.antiquant.named(), "x1, bias and x3 have gradients, a quantised weight has none")
    return _operands(given, WeightQuant(scale, offset, size, packed), dtype, n)


def _full_quant(given: Given) -> Operands:
    """int8 by int8: the output is bfloat16 where dequant_scale is, else float16, as in the vendor's wrapper."""
    check_product(given.x1, given.x2)
    _refuse(given.antiquant.named(), "x1 and x2 are int8; this is for a floating x1", "use dequant_scale")
    n, rows = given.x2.shape[1], prod(given.x1.shape[:-1])
    scale, per_token = given.dequant.scale, given.dequant.per_token
    if scale is None:
        if per_token is not None:
            raise UsageError("pertoken_scale", kind(per_token), "it multiplies dequant_scale", "pass dequant_scale too")
        raise UsageError("dequant_scale", None, "int8 by int8 needs one", "pass [1] or [n], see pack_dequant_scale")
    if scale.dtype == torch.float32 and per_token is None:
        constraint = "float32 goes with pertoken_scale only"
        raise UsageError("dequant_scale", kind(scale), constraint, "use pack_dequant_scale(scale), or bfloat16")
    check_like("dequant_scale", scale, (*PACKED, torch.bfloat16, torch.float32), [[1], [n], [1, n]])
    if per_token is not None:
        check_like("pertoken_scale", per_token, (torch.float32,), [[rows]])
    dtype = torch.bfloat16 if scale.dtype == torch.bfloat16 else torch.float16
    wire = _wire(given, dtype, n)
    refuse_gradients(given.dequant.named() | {"x3": given.x3}, INFERENCE)
    return _operands(given, FullQuant(scale, per_token, wire), dtype, n)


def _wire(given: Given, dtype: torch.dtype, n: int) -> tuple[Tensor, Tensor] | None:
    first, second = given.dequant.wire_1, given.dequant.wire_2
    if first is None and second is None:
        return None
    if first is None or second is None:
        missing = "comm_quant_scale_1" if first is None else "comm_quant_scale_2"
        raise UsageError(missing, None, "int8 on the wire takes two scales, one a leg", "pass both or neither")
    check_like("comm_quant_scale_1", first, (dtype,), [[n], [1, n]])
    check_like("comm_quant_scale_2", second, (dtype,), [list(first.shape)])
    return first, second


def _operands(given: Given, quant: WeightQuant | FullQuant | None, dtype: torch.dtype, n: int) -> Operands:
    """What all modes share: bias counts in the product's dtype, x3 is like the output."""
    shape = (*given.x1.shape[:-1], n)
    check_bias(given.bias, torch.int32 if isinstance(quant, FullQuant) else dtype, n)
    check_addend(given.x3, dtype, shape)
    return Operands(given.x1, given.x2, given.bias, given.x3, quant, dtype, shape, given.comm_turn, given.tag)


# ---- single rules


def check_product(x1: Tensor, x2: Tensor) -> None:
    """One dtype, and as many columns in x1 as rows in x2."""
    _check_inner(x1, x2.shape[0])
    if x1.dtype != x2.dtype:
        raise UsageError("x2", name_of(x2.dtype), f"x1 is {name_of(x1.dtype)}", "convert one of them")


def check_bias(bias: Tensor | None, dtype: torch.dtype, n: int) -> None:
    """`[n]`, of the dtype in which it is added."""
    if bias is not None:
        check_like("bias", bias, (dtype,), [[n]])


def check_addend(x3: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], name: str = "x3") -> None:
    """Like the output."""
    if x3 is not None and (x3.dtype != dtype or x3.shape != shape):
        constraint = f"{name} is like the output, {name_of(dtype)} {list(shape)}"
        raise UsageError(name, kind(x3), constraint, "pass one like that")


def check_like(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], shapes: list[list[int]]) -> None:
    """One of some dtypes and one of some shapes."""
    if x.dtype not in dtypes or list(x.shape) not in shapes:
        types, sizes = " or ".join(map(name_of, dtypes)), " or ".join(map(str, shapes))
        raise UsageError(name, kind(x), f"{name} is {types} {sizes}", "pass one like that")


def refuse_gradients(inputs: Named, because: str) -> None:
    """The first of these that requires a gradient, while gradients are recorded."""
    for name, value in inputs.items():
        if torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad:
            raise UnsupportedError(f"{name}=requires_grad: {because}; detach it, or call under torch.no_grad()")


def kind(x: Tensor) -> str:
    """`float32 [4, 5]`."""
    return f"{name_of(x.dtype)} {list(x.shape)}"


def _check_inner(x1: Tensor, k: int) -> None:
    if x1.shape[-1] != k:
        raise UsageError("x1", list(x1.shape), f"x1 is [m, k] or [b, s, k] with k = {k}", "match x2's rows")


def _unpacked_shape(given: Given) -> tuple[Literal["k", "n"] | None, int, int]:
    """The dim in which x2 is packed, and its k and n. An int32 x2 is words of eight int4: `[k, n/8]`, or `[k/8, n]`.

    x1's k tells which, so a copy in another memory order means the same. Where k is 0 both fit: then the columns of
    antiquant_scale tell, or the strides of a transposed view. A single column is then taken for eight.
    """
    rows, columns = given.x2.shape
    if given.x2.dtype == torch.int8:
        return None, rows, columns
    k, scale = given.x1.shape[-1], given.antiquant.scale
    named = scale.shape[-1] if scale is not None and scale.dim() else 1
    along_k = named == columns if named > 1 else given.x2.stride(0) == 1
    if rows * NIBBLES == k and (k or (along_k and columns > 1)):
        return "k", k, columns
    if rows == k:
        return "n", k, columns * NIBBLES
    constraint = f"int4 words are [k, n/8], or [k/8, n] as the view of [n, k/8], with k = {k}"
    raise UsageError("x2", kind(given.x2), constraint, "pack it along its last dim, and match x1's columns")


def _refuse(inputs: Named, because: str, remedy: str) -> None:
    """The first of these that was passed, none of which this mode has."""
    for name, value in inputs.items():
        if value is not None:
            raise UsageError(name, kind(value) if isinstance(value, Tensor) else value, because, remedy)
