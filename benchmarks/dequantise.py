"""How fast quantised weights become float32 on one thread: ours against the gguf package, type by type.

`python benchmarks/dequantise.py`: MB of float32 made a second from blocks in memory, 4 million values at once, rows of
4,096; the best of five each. Both give the same bits. GPTQ, AWQ and FP8 are read from files in memory, through a
checkpoint; nothing else at hand makes floats of those without a GPU.
"""

import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from shardwright.checkpoint.blocks import QUANTISED
from shardwright.checkpoint.dequantise import decode
from shardwright.checkpoint.entry import BLOCKS
from shardwright.checkpoint.opening import open_checkpoint
from shardwright.checkpoint.reading import CHUNK
from shardwright.layout.spec import Piece

ROWS, COLUMNS = 1_024, 4_096
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def rate(work: Callable[[], object], values: int) -> float:
    """MB of float32 a second."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return values * 4 / best / 1e6


def in_chunks(raw: Tensor, dtype: str, out: Tensor) -> None:
    """As loading goes: a chunk of the file at a time, copied to where it belongs."""
    block, at = BLOCKS[dtype], 0
    size = CHUNK // block.nbytes * block.nbytes
    for start in range(0, len(raw), size):
        values = decode(raw[start : start + size].clone(), dtype)
        out[at : at + len(values)].copy_(values)
        at += len(values)


def blocks() -> None:
    """Every type of GGUF."""
    out = torch.empty(ROWS * COLUMNS)
    for dtype in QUANTISED:
        block, kind = BLOCKS[dtype], gguf.GGMLQuantizationType[dtype.upper()]
        raw = np.random.default_rng(0).integers(0, 256, ROWS * COLUMNS // block.elements * block.nbytes, dtype=np.uint8)
        ours = rate(lambda: in_chunks(torch.from_numpy(raw), dtype, out), out.numel())  # noqa: B023
        try:
            theirs = rate(lambda: gguf.quants.dequantize(raw.reshape(ROWS, -1), kind), out.numel())  # noqa: B023
        except NotImplementedError:
            theirs = float("nan")
        print(f"{dtype:8} {ours:6.0f}  gguf {theirs:6.0f}")


def packed(name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """One weight of a Hugging Face checkpoint."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as where:
        (Path(where) / "config.json").write_text(json.dumps({"quantization_config": config}))
        save_file(tensors, Path(where) / "model.safetensors")
        box = ((0, ROWS), (0, COLUMNS))
        out, piece = torch.empty(ROWS, COLUMNS), Piece("a.weight", (ROWS, COLUMNS), ((box[0],), (box[1],)), box, (0,))
        with open_checkpoint(where) as checkpoint:
            print(f"{name:8} {rate(lambda: checkpoint.read(piece, out), out.numel()):6.0f}")


def words(*shape: int) -> Tensor:
    """Random codes."""
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # random scales overflow
    blocks()
    groups, tables = COLUMNS // 128, {"a.scales": torch.rand(COLUMNS // 128, ROWS).half()}
    tables["a.qzeros"] = words(groups, ROWS // 8)
    order = (torch.arange(COLUMNS) // 128)[torch.randperm(COLUMNS)].int()
    packed("gptq", GPTQ, {"a.qweight": words(COLUMNS // 8, ROWS), "a.g_idx": order, **tables})
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128}
    packed("awq", awq, {"a.qweight": words(COLUMNS, ROWS // 8), **tables})
    eight = torch.randint(0, 120, (ROWS, COLUMNS), dtype=torch.uint8).view(torch.float8_e4m3fn)
    packed("fp8", {"quant_method": "fp8"}, {"a.weight": eight, "a.weight_scale_inv": torch.rand(ROWS // 128, groups)})


if __name__ == "__main__":
    main()
