"""Blocks of GGUF's quantised types as a file may hold them: random codes, finite scales."""

import gguf
import numpy as np

from shardwright.checkpoint.entry import BLOCKS

SCALES = {
    "q4_1": (0, 2), "q5_1": (0, 2), "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
}  # fmt: skip
"""Where a block's float16 numbers lie; the first two bytes of the types not named."""


def random_blocks(dtype: str, count: int, random: np.random.Generator) -> np.ndarray:
    """`[count, bytes]`."""
    blocks = random.integers(0, 256, (count, BLOCKS[dtype].nbytes), dtype=np.uint8)
    if dtype == "q8_k":
        blocks[:, :4] = random.standard_normal((count, 1), dtype=np.float32).view(np.uint8)
        return blocks
    for at in SCALES.get(dtype, (0,)):
        magnitude = random.integers(0, 0x7C00, (count, 1), dtype=np.uint16)
        sign = random.integers(0, 2, (count, 1), dtype=np.uint16) << 15
        blocks[:, at : at + 2] = (magnitude | sign).view(np.uint8)
    return blocks


def quantisable(dtype: str) -> bool:
    """Whether the gguf package can write the type itself."""
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    try:
        gguf.quants.quantize(np.zeros((1, 256), dtype=np.float32), kind)
    except NotImplementedError:
        return False
    return True
