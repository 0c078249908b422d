"""Raw bytes of a file as values. Plain types are views and cost nothing; the others are `blocks`'. Knows no shape."""

import torch
from torch import Tensor

from shardwright.checkpoint.blocks import QUANTISED
from shardwright.checkpoint.entry import BLOCKS

PLAIN = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
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
