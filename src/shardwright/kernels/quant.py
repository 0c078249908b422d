"""Number formats of quantised operands: int4 words, packed dequantisation scales, weights and int8 back to floats.

Knows nothing of ranks or of which operator asks. The formats are the Ascend ones, so that a file quantised there runs
here; sources are named where each is defined.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from shardwright.comm.group import name_of
from shardwright.errors import UsageError

NIBBLES = 8
"""int4 values in an int32 word."""

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
SIGN = 1 << 31
SCALE_BITS = 0xFFFFE000
SCALE_MARK = 1 << 46
OFFSET_BIT, OFFSET_BITS = 37, 0x1FF


@dataclass(frozen=True)
class WeightQuant:
    """The weight alone is integers: `(x2 + offset) * scale`. packed: the dim of x2 that is int4 words; None for int8.

    scale and offset are `[1]`, `[n]` or `[1, n]`, or `[ceil(k / group_size), n]` where there is a group_size.
    """

    scale: Tensor
    offset: Tensor | None
    group_size: int
    packed: Literal["k", "n"] | None

    def columns(self, start: int, stop: int) -> "WeightQuant":
        """That of the columns `start…stop` of the weight, counted in values."""
        offset = None if self.offset is None else _columns(self.offset, start, stop)
        return replace(self, scale=_columns(self.scale, start, stop), offset=offset)


@dataclass(frozen=True)
class FullQuant:
    """Both factors are int8: `scale * per_token * (x1 @ x2 + bias)`. scale is read with `dequant_scale`.

    wire: the scales with which partial sums, and then the total, travel as int8.
    """

    scale: Tensor
    per_token: Tensor | None
    wire: tuple[Tensor, Tensor] | None

    def columns(self, start: int, stop: int) -> "FullQuant":
        """That of the columns `start…stop` of the product."""
        wire = self.wire and (_columns(self.wire[0], start, stop), _columns(self.wire[1], start, stop))
        return replace(self, scale=_columns(self.scale, start, stop), wire=wire)

    def rows(self, start: int, stop: int) -> "FullQuant":
        """That of the rows `start…stop` of the product."""
        return replace(self, per_token=None if self.per_token is None else self.per_token[start:stop])


def pack_int4(weight: Tensor) -> Tensor:
    """Eight values of −8…7 a word along the last dim, the first in the lowest nibble: int `[…, 8 w]` → int32 `[…, w]`.

    This is what `torch_npu.npu_convert_weight_to_int4pack` makes of a weight in plain (ND) order; its documentation
    calls the words interleaved, its source fills them in sequence (Ascend/op-plugin, ConvertWeightToINT4Pack). The
    fractal order (NZ) it makes of NZ inputs is the device's own and not read here.

    Raises:
        UsageError: not integers, a last dim that 8 does not divide, a value outside −8…7.
    """
    if weight.dtype not in INTEGERS or not weight.dim() or weight.shape[-1] % NIBBLES:
        kind = f"{name_of(weight.dtype)} {list(weight.shape)}"
        raise UsageError("weight", kind, f"integers whose last dim {NIBBLES} divides", "round and pad it first")
    if weight.numel() and not weight.is_meta and not -8 <= int(weight.min()) <= int(weight.max()) <= 7:
        values = f"{int(weight.min())}…{int(weight.max())}"
        raise UsageError("weight", values, "an int4 is −8…7", "quantise with a larger scale")
    nibbles = weight.to(torch.int64).reshape(*weight.shape[:-1], weight.shape[-1] // NIBBLES, NIBBLES) & 0xF
    return _signed((nibbles << _shifts(weight)).sum(-1))


def unpack_int4(words: Tensor) -> Tensor:
    """The values of `pack_int4`: int32 `[…, w]` → int8 `[…, 8 w]`."""
    nibbles = (words[..., None] >> _shifts(words)) & 0xF
    return ((nibbles ^ 8) - 8).to(torch.int8).flatten(-2)


def pack_dequant_scale(scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """The 64-bit form in which the device takes a float32 scale: `(bits(scale) & 0xFFFFE000) | 1 << 46`, as int64.

    scale: float32 `[1]`, `[n]` or `[1, n]`; its low 13 bits are lost, so up to 2⁻¹⁰ of its value, towards zero.
    offset: float32, of scale's shape or one that broadcasts; `clip(round(offset), −256, 255) & 0x1FF` at bit 37, a half
    rounded to even. Offsets are for int8 outputs: `matmul_all_reduce` has none and does not look at them.
    The result is what `torch_npu.npu_trans_quant_param` gives (formula: aclnnTransQuantParam, hicann/ops-nn).

    Raises:
        UsageError: scale or offset is not float32, or their shapes do not broadcast.
    """
    if scale.dtype != torch.float32:
        raise UsageError("scale", name_of(scale.dtype), "a packed scale is made from float32", "pass scale.float()")
    packed = (scale.detach().contiguous().view(torch.int32).to(torch.int64) & SCALE_BITS) | SCALE_MARK
    if offset is None:
        return packed
    if offset.dtype != torch.float32 or (offset.numel() not in (1, scale.numel()) and scale.numel() != 1):
        kind = f"{name_of(offset.dtype)} {list(offset.shape)}"
        raise UsageError("offset", kind, f"float32, one or as many as scale {list(scale.shape)}", "pass one like scale")
    whole = offset.detach().round().clamp(-256, 255).to(torch.int64)
    return packed | (whole & OFFSET_BITS) << OFFSET_BIT


def unpack_dequant_scale(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset of `pack_dequant_scale`, both float32: int64 or uint64 in, their bits read alike."""
    bits = packed.contiguous().view(torch.int64)
    offset = (bits >> OFFSET_BIT) & OFFSET_BITS
    return _signed(bits & SCALE_BITS).view(torch.float32), ((offset ^ 0x100) - 0x100).float()


def dequant_scale(scale: Tensor) -> Tensor:
    """The float32 values of a dequantisation scale, packed or not, as `[1]` or `[n]`."""
    packed = scale.dtype in (torch.int64, torch.uint64)
    return (unpack_dequant_scale(scale)[0] if packed else scale.float()).flatten()


def floating_weight(x2: Tensor, weight: WeightQuant | None) -> Tensor:
    """x2 as it enters a floating matmul, `[k, n]`: itself, or `(x2 + offset) * scale` in scale's dtype.

    Half types are computed in float32 and rounded once.
    """
    if weight is None:
        return x2
    if weight.packed is not None:
        x2 = unpack_int4(x2) if weight.packed == "n" else unpack_int4(x2.T).T
    wide = torch.float64 if weight.scale.dtype == torch.float64 else torch.float32
    values = x2.to(wide)
    if weight.offset is not None:
        values = values + _by_row(weight.offset, weight.group_size, len(x2)).to(wide)
    return (values * _by_row(weight.scale, weight.group_size, len(x2)).to(wide)).to(weight.scale.dtype)


def quantise_int8(x: Tensor) -> Tensor:
    """To the nearest int8, halves to even, values beyond −128…127 to the nearer end."""
    return x.round().clamp(-128, 127).to(torch.int8)


def _columns(parameter: Tensor, start: int, stop: int) -> Tensor:
    return parameter if parameter.shape[-1] == 1 else parameter[..., start:stop]


def _by_row(parameter: Tensor, group_size: int, rows: int) -> Tensor:
    return parameter.repeat_interleave(group_size, 0)[:rows] if group_size else parameter


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(0, 4 * NIBBLES, 4, dtype=torch.int32, device=like.device)


def _signed(low: Tensor) -> Tensor:
    """The low 32 bits of an int64 as an int32 of the same bits."""
    return ((low ^ SIGN) - SIGN).to(torch.int32)
