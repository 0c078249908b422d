"""GGUF's block-quantised types as values.

Decides the arithmetic of each: in float32, each operation rounded, as the format's own tools have it. A function takes
whole blocks as bytes, `[blocks, bytes]`, and gives `[blocks, elements]`. Knows no file and no shape.

Several codes at a time are taken out of a word: on single bytes torch spends its time on rows of 16.

Formats: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (`block_q4_0` and its neighbours)
"""

from collections.abc import Callable

import torch
from torch import Tensor

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The values that IQ4's codes stand for (`kvalues_iq4nl`)."""


def q4_0(blocks: Tensor) -> Tensor:
    """`[blocks, 18]`: scale, then 16 bytes whose low nibbles come first. value = scale * (code - 8)"""
    return _codes(blocks[:, 2:], 4).float().sub_(8).mul_(_halves(blocks, 0))


def q4_1(blocks: Tensor) -> Tensor:
    """`[blocks, 20]`: scale, minimum, 16 bytes of nibbles. value = scale * code + minimum"""
    return _codes(blocks[:, 4:], 4).float().mul_(_halves(blocks, 0)).add_(_halves(blocks, 2))


def q5_0(blocks: Tensor) -> Tensor:
    """`[blocks, 22]`: scale, 32 fifth bits, 16 bytes of nibbles. value = scale * (code - 16)"""
    codes = _codes(blocks[:, 6:], 4) | _fifth_bits(blocks[:, 2:6])
    return codes.float().sub_(16).mul_(_halves(blocks, 0))


def q5_1(blocks: Tensor) -> Tensor:
    """`[blocks, 24]`: scale, minimum, 32 fifth bits, 16 bytes of nibbles. value = scale * code + minimum"""
    codes = _codes(blocks[:, 8:], 4) | _fifth_bits(blocks[:, 4:8])
    return codes.float().mul_(_halves(blocks, 0)).add_(_halves(blocks, 2))


def q8_0(blocks: Tensor) -> Tensor:
    """`[blocks, 34]`: scale, 32 signed bytes. value = scale * byte"""
    return blocks[:, 2:].view(torch.int8).float().mul_(_halves(blocks, 0))


def q2_k(blocks: Tensor) -> Tensor:
    """`[blocks, 84]`: 16 bytes of scale and minimum (4 bits each), 64 bytes of 2-bit codes, two scales of those."""
    scales = blocks[:, :16]
    high = _halves(blocks, 80) * (scales & 15).float()
    low = _halves(blocks, 82) * (scales >> 4).float()
    return _scaled(_codes(blocks[:, 16:80], 2, run=32), high, low)


def q3_k(blocks: Tensor) -> Tensor:
    """`[blocks, 110]`: 256 third bits, 64 bytes of 2-bit codes, 16 scales of 6 bits, their scale."""
    # A third bit that is set means that nothing is subtracted.
    codes = _codes(blocks[:, 32:96], 2, run=32) | _codes(blocks[:, :32], 1) << 2
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    lows = torch.cat([low & 15, low >> 4], 1)
    highs = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], 1)
    scales = (lows | highs << 4).float().sub_(32)
    return _scaled(codes, _halves(blocks, 108) * scales, offset=4)


def q4_k(blocks: Tensor) -> Tensor:
    """`[blocks, 144]`: two scales, 8 scales and 8 minima of 6 bits each, 128 bytes of nibbles."""
    high, low = _six_bits(blocks)
    return _scaled(_codes(blocks[:, 16:], 4, run=32), high, low)


def q5_k(blocks: Tensor) -> Tensor:
    """`[blocks, 176]`: as q4_k, with 256 fifth bits before the nibbles."""
    high, low = _six_bits(blocks)
    return _scaled(_codes(blocks[:, 48:], 4, run=32) | _codes(blocks[:, 16:48], 1) << 4, high, low)


def q6_k(blocks: Tensor) -> Tensor:
    """`[blocks, 210]`: 128 bytes of nibbles, 64 bytes of two higher bits, 16 signed scales, their scale."""
    codes = _codes(blocks[:, :128], 4, run=64) | _codes(blocks[:, 128:192], 2, run=32) << 4
    scales = _halves(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return _scaled(codes, scales, offset=32)


def q8_k(blocks: Tensor) -> Tensor:
    """`[blocks, 292]`: a float32 scale, 256 signed bytes, and sums of them that are not needed here."""
    return blocks[:, 4:260].view(torch.int8).float().mul_(blocks.view(torch.float32)[:, :1])


def iq4_nl(blocks: Tensor) -> Tensor:
    """`[blocks, 18]`: as q4_0, with codes that stand for the values of `IQ4`."""
    return _looked_up(_codes(blocks[:, 2:], 4)).mul_(_halves(blocks, 0))


def iq4_xs(blocks: Tensor) -> Tensor:
    """`[blocks, 136]`: a scale, 8 scales of 6 bits (high bits first, together), 128 bytes of nibbles as iq4_nl's."""
    low, high = blocks[:, 4:8, None], blocks[:, 2:4, None]
    lows = torch.cat([low & 15, low >> 4], 2).view(-1, 8)
    highs = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], 2).view(-1, 8)
    scales = _halves(blocks, 0) * (lows | highs << 4).float().sub_(32)
    values = _looked_up(_codes(blocks[:, 8:], 4, run=16))
    return values.view(-1, 8, 32).mul_(scales[..., None]).view(-1, 256)


QUANTISED: dict[str, Callable[[Tensor], Tensor]] = {
    "q4_0": q4_0, "q4_1": q4_1, "q5_0": q5_0, "q5_1": q5_1, "q8_0": q8_0, "iq4_nl": iq4_nl, "iq4_xs": iq4_xs,
    "q2_k": q2_k, "q3_k": q3_k, "q4_k": q4_k, "q5_k": q5_k, "q6_k": q6_k, "q8_k": q8_k,
}  # fmt: skip


def _halves(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, `[blocks, 1]`, in float32."""
    return blocks.view(torch.float16)[:, at // 2 : at // 2 + 1].float()


def _codes(packed: Tensor, bits: int, run: int | None = None) -> Tensor:
    """Codes of `bits` bits, `[blocks, codes]` in bytes: of each `run` bytes (by default all) the lowest ones first."""
    count, (blocks, width) = 8 // bits, packed.shape
    run = run or width
    word = torch.int32 if packed.stride(0) % 4 == 0 and packed.storage_offset() % 4 == 0 else torch.int16
    words = packed.view(word)
    words = words.as_strided((blocks, width // run, run // word.itemsize), (words.stride(0), run // word.itemsize, 1))
    codes = torch.empty(blocks, width // run, count, words.shape[-1], dtype=word)
    for i in range(count):
        torch.bitwise_right_shift(words, bits * i, out=codes[:, :, i])
    codes &= ((1 << bits) - 1) * (0x01010101 if word == torch.int32 else 0x0101)
    return codes.view(torch.uint8).view(blocks, -1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """`[blocks, 4]` → `[blocks, 32]`: 16 where the bit is set."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    table = (bits << 4).to(torch.uint8).view(torch.int64)
    return table.view(-1).index_select(0, packed.reshape(-1).int()).view(torch.uint8).view(-1, 32)


def _six_bits(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of a q4_k or q5_k block, each `[blocks, 8]`, times the scale that its first bytes hold."""
    scales, minima, both = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    high = torch.cat([scales & 63, (both & 15) | (scales >> 2 & 48)], 1)
    low = torch.cat([minima & 63, (both >> 4) | (minima >> 2 & 48)], 1)
    return _halves(blocks, 0) * high.float(), _halves(blocks, 2) * low.float()


def _scaled(codes: Tensor, high: Tensor, low: Tensor | None = None, offset: int = 0) -> Tensor:
    """(code - offset) * high - low, with one of `high`, `[blocks, n]`, for each n-th of a block."""
    values = codes.float().view(len(codes), high.shape[1], -1)
    if offset:
        values.sub_(offset)
    values.mul_(high[..., None])
    if low is not None:
        values.sub_(low[..., None])
    return values.view(len(codes), -1)


def _looked_up(codes: Tensor) -> Tensor:
    """Two codes at a time: a table of pairs is looked up half as often."""
    values = torch.tensor(IQ4, dtype=torch.float32)
    pairs = torch.zeros(16, 256, 2)
    pairs[:, :16, 0], pairs[:, :16, 1] = values, values[:, None]
    table = pairs.view(torch.int64).view(-1)
    return table.index_select(0, codes.view(torch.int16).view(-1).int()).view(torch.float32).view(len(codes), -1)
