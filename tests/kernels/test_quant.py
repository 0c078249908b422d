"""Number formats against loops over their bits, written from the published formulas; all exact."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.calls import nibbles

from shardwright.errors import UsageError
from shardwright.kernels.quant import (
    WeightQuant,
    floating_weight,
    pack_dequant_scale,
    pack_int4,
    quantise_int8,
    unpack_dequant_scale,
    unpack_int4,
)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


# ---- int4


@settings(deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(-8, 7), min_size=16, max_size=16), max_size=5))
def test_eight_values_a_word_the_first_lowest(rows: list[list[int]]) -> None:
    weight = torch.tensor(rows, dtype=torch.int32).reshape(-1, 16)
    words = pack_int4(weight)
    assert (words.dtype, words.shape) == (torch.int32, (len(rows), 2))
    assert torch.equal(unpack_int4(words), weight.to(torch.int8))
    if rows:
        assert nibbles(np.asarray(words), len(rows)).tolist() == weight.tolist()


def test_a_word_is_these_bits() -> None:
    assert pack_int4(torch.tensor([1, 2, 3, 4, 5, 6, 7, -8])).tolist() == [0x87654321 - 2**32]
    assert pack_int4(torch.tensor([-1] * 8, dtype=torch.int8)).tolist() == [-1]


@pytest.mark.parametrize(("weight", "said"), [
    (torch.zeros(2, 8), r"weight=float32 \[2, 8\]: integers whose last dim 8 divides; round and pad it first"),
    (torch.zeros(2, 7).int(), r"weight=int32 \[2, 7\]: integers whose last dim 8 divides"),
    (torch.tensor(3), r"weight=int64 \[\]: integers"),
    (torch.tensor([0, 1, 2, 3, 4, 5, 6, 8]), "weight=0…8: an int4 is −8…7; quantise with a larger scale"),
    (torch.tensor([0, 1, 2, 3, 4, 5, 6, -9]), "weight=-9…6: an int4 is −8…7"),
])  # fmt: skip
def test_what_does_not_fit_a_word_is_refused(weight: torch.Tensor, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        pack_int4(weight)


# ---- packed scales


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(FLOATS, st.floats(-400, 400, width=32)), min_size=1, max_size=4))
def test_a_packed_scale_is_its_published_bits(pairs: list[tuple[float, float]]) -> None:
    scale, offset = torch.tensor(pairs).T
    packed = pack_dequant_scale(scale, offset)
    assert packed.dtype == torch.int64
    for (value, shift), alone, both in zip(pairs, pack_dequant_scale(scale).tolist(), packed.tolist(), strict=True):
        bits = struct.unpack("<I", struct.pack("<f", value))[0]
        assert alone == bits & 0xFFFFE000 | 1 << 46
        assert both == alone | (min(max(round(shift), -256), 255) & 0x1FF) << 37
    values, shifts = unpack_dequant_scale(packed)
    # 2⁻¹⁰ of the value is lost at most, towards zero; of a subnormal, what its low 13 bits were worth.
    assert (values.abs() <= scale.abs()).all()
    assert ((values - scale).abs() <= scale.abs() * 2.0**-10 + 2.0**-136).all()
    assert torch.equal(shifts, offset.round().clamp(-256, 255))


def test_unsigned_scales_are_the_same_bits() -> None:
    packed = pack_dequant_scale(torch.tensor([[0.5, -3.0]]), torch.tensor([-7.0]))
    for bits in (packed, packed.view(torch.uint64)):
        scale, offset = unpack_dequant_scale(bits)
        assert (scale.tolist(), offset.tolist()) == ([[0.5, -3.0]], [[-7.0, -7.0]])


def test_one_scale_and_many_offsets_broadcast() -> None:
    """As the vendor's: the longer of the two gives the shape."""
    scale, offset = unpack_dequant_scale(pack_dequant_scale(torch.tensor([2.0]), torch.tensor([1.0, -1.0])))
    assert (scale.tolist(), offset.tolist()) == ([2.0, 2.0], [1.0, -1.0])


def test_a_scale_may_be_a_strided_view() -> None:
    scale = torch.arange(1.0, 7.0)
    assert torch.equal(unpack_dequant_scale(pack_dequant_scale(scale[::2]))[0], scale[::2])
    assert torch.equal(unpack_dequant_scale(pack_dequant_scale(scale)[::2])[0], scale[::2])


def test_what_cannot_be_packed_is_refused() -> None:
    one = torch.ones(3)
    with pytest.raises(UsageError, match=r"scale=float16: a packed scale is made from float32; pass scale.float\(\)"):
        pack_dequant_scale(one.half())
    with pytest.raises(UsageError, match=r"offset=int64 \[3\]: float32, one or as many as scale \[3\]; pass one like"):
        pack_dequant_scale(one, one.long())
    with pytest.raises(UsageError, match=r"offset=float32 \[2\]: float32, one or as many as scale \[3\]"):
        pack_dequant_scale(one, one[:2])


# ---- weights and activations


def test_the_offset_comes_first_and_the_last_group_may_be_short() -> None:
    """Rows 0…31 take the first group's, 32…39 the second's; small integers, so that every dtype is exact."""
    x2 = torch.arange(-40, 40, dtype=torch.int8).reshape(40, 2)
    scale, offset = torch.tensor([[1.0, 2.0], [4.0, 8.0]]), torch.tensor([[1.0, 0.0], [2.0, -1.0]])
    expected = [
        [(float(x2[i, j]) + float(offset[i // 32, j])) * float(scale[i // 32, j]) for j in (0, 1)] for i in range(40)
    ]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        weight = floating_weight(x2, WeightQuant(scale.to(dtype), offset.to(dtype), 32, None))
        assert weight.dtype == dtype
        assert torch.equal(weight, torch.tensor(expected).to(dtype))


def test_a_half_weight_is_rounded_once() -> None:
    """(100 + 0.25) * 0.1 in bfloat16 would lose the 0.25 and be 10; in float32 it is 10.035, nearest to 10.0625."""
    parameters = torch.tensor([0.1]).bfloat16(), torch.tensor([0.25]).bfloat16()
    weight = floating_weight(torch.tensor([[100]], dtype=torch.int8), WeightQuant(*parameters, 0, None))
    assert weight.item() == 10.0625


def test_int8_rounds_halves_to_even_and_saturates() -> None:
    x = torch.tensor([-0.5, 0.5, 1.5, 2.5, -1.5, 126.5, 127.5, 1e9, -128.4, -1e9])
    assert quantise_int8(x).tolist() == [0, 0, 2, 2, -2, 126, 127, 127, -128, -128]
