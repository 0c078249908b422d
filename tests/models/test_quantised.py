"""Whole models from GPTQ, AWQ and FP8 checkpoints, against transformers with the same weights made floats beforehand.

float32 logits within 1e-4 of the largest, for the reason given in `test_transformers`. 3 ranks cut F = 80 and the heads
inside words and groups.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.checkpoint.packing import awq, gptq, quantised
from tests.models.test_gguf import TEXTS, logits_of
from torch import Tensor

from shardwright.comm.single import SingleGroup
from shardwright.errors import FileError
from shardwright.models.load import load
from shardwright.testing.ranks import on_threads

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 53,
}
Written = tuple[dict[str, Tensor], Tensor]
"""The tensors of a file, and the weight that they are."""


def as_gptq(stem: str, weight: Tensor) -> Written:
    """Every other one in an order of its own."""
    made = quantised(weight, 32, act_order=len(stem) % 2 == 0)
    return gptq(stem, made), made.weight


def as_awq(stem: str, weight: Tensor) -> Written:
    made = quantised(weight, 16)
    return awq(stem, made), made.weight


def as_fp8(stem: str, weight: Tensor) -> Written:
    """Blocks of 32, so that these small weights have several."""
    rows, columns = (torch.arange(size) // 32 for size in weight.shape)
    scale = torch.rand(int(rows[-1]) + 1, int(columns[-1]) + 1) / 100 + 1e-3
    spread = scale[rows][:, columns]
    stored = (weight / spread).to(torch.float8_e4m3fn)
    return {f"{stem}.weight": stored, f"{stem}.weight_scale_inv": scale}, stored.float() * spread


METHODS: dict[str, tuple[dict[str, Any], Callable[[str, Tensor], Written]]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, as_gptq),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, as_awq),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [32, 32]}, as_fp8),
}


def write(folder: Path, twin: Any, path: Path, method: str, extra: dict[str, Tensor]) -> Path:
    """The model with its projections quantised; the twin's own become what these are."""
    config, made = METHODS[method]
    tensors: dict[str, Tensor] = dict(extra)
    for name, parameter in twin.named_parameters():
        if not name.endswith("proj.weight"):
            tensors[name] = parameter.detach().clone()
            continue
        parts, parameter.data = made(name.removesuffix(".weight"), parameter.detach())
        tensors |= {part: tensor.contiguous() for part, tensor in parts.items()}
    folder.mkdir()
    said = json.loads((path / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(said))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_logits_equal(saved: Any, tmp_path: Path, method: str) -> None:
    twin, path = saved("llama", **SIZES)
    where = write(tmp_path / "model", twin, path, method, {})
    with torch.no_grad():
        expected = torch.cat([twin(torch.tensor([text])).logits[0] for text in TEXTS])
    for tp in (1, 3, 5):
        for logits, *_ in on_threads(tp, logits_of, where):
            assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("value", "fine"), [(0.0, True), (1e-3, False)])
def test_biases_that_a_tool_adds_are_nothing_only_where_they_are_zero(
    saved: Any, tmp_path: Path, value: float, fine: bool
) -> None:
    """AutoGPTQ writes a bias of zeros for every layer; a Llama has no place for one."""
    twin, path = saved("llama", **SIZES)
    name = "model.layers.1.mlp.up_proj.bias"
    where = write(tmp_path / "model", twin, path, "gptq", {name: torch.full((80,), value).half()})
    if fine:
        load(where, SingleGroup())
        return
    with pytest.raises(FileError, match=f"tensor '{name}' .1 such. has no place in a llama model"):
        load(where, SingleGroup())
