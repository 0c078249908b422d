"""Raw bytes of a file as values.

Decides the arithmetic of each block type: in float32, each operation rounded, as the format's own tools have it. Plain
types are views and cost nothing. Knows no file and no shape.

Formats: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (`block_q4_1`, `block_q8_0`)
"""

import torch
from torch import Tensor

from shardwright.checkpoint.entry import BLOCKS

PLAIN = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def decode(raw: Tensor, dtype: str) -> Tensor:
    """`raw [bytes]`, uint8 and whole blocks → values `[elements]`: a view of plain types, new float32 of the others."""
    if dtype in PLAIN:
        return raw.view(PLAIN[dtype])
    return QUANTISED[dtype](raw.view(-1, BLOCKS[dtype].nbytes)).view(-1)


def q4_1(blocks: Tensor) -> Tensor:
    """`[blocks, 20]` → `[blocks, 32]`: scale, minimum (float16), then 16 bytes whose low nibbles come first.

    value = scale * nibble + minimum
    """
    scales = blocks.view(torch.float16)[:, :2].float()
    # Four bytes at a time: on single ones torch spends its time on rows of 16.
    packed = blocks.view(torch.int32)[:, 1:]
    nibbles = torch.empty(len(blocks), 2, 4, dtype=torch.int32)
    nibbles[:, 0] = packed
    nibbles[:, 1] = packed >> 4
    nibbles &= 0x0F0F0F0F
    values = nibbles.view(torch.uint8).view(-1, 32).float()
    return values.mul_(scales[:, :1]).add_(scales[:, 1:])


def q8_0(blocks: Tensor) -> Tensor:
    """`[blocks, 34]` → `[blocks, 32]`: scale (float16), then 32 signed bytes.

    value = scale * byte
    """
    scale = blocks.view(torch.float16)[:, :1].float()
    return blocks[:, 2:].view(torch.int8).float().mul_(scale)


QUANTISED = {"q4_1": q4_1, "q8_0": q8_0}
