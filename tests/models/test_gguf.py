"""Models read from GGUF files, written by the gguf package as llama.cpp's converter would, against transformers.

float32 logits within 1e-4 of the largest, for the reason given in `test_transformers`.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from tests.models.converter import Extra, write
from torch import Tensor

from shardwright.comm import regions
from shardwright.comm.group import Group
from shardwright.comm.single import SingleGroup
from shardwright.errors import FileError, UnsupportedError
from shardwright.layers.batch import Batch
from shardwright.models.load import load
from shardwright.testing.ranks import on_threads

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 37,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
"""Rows are whole blocks of 32 values, so that every matrix may be quantised; 3 ranks cut them inside a block."""
TEXTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 36], [22], [0, 7]]


def logits_of(group: Group, path: Path) -> tuple[Tensor, int, int]:
    loaded = load(path, group, dtype="float32")
    with torch.no_grad():
        logits = loaded.model(Batch.whole(TEXTS))
    whole = regions.gather(logits, 1, loaded.model.cuts.vocabulary.widths, group)
    return whole, loaded.weight_bytes, loaded.bytes_read


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0, Type.Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("family", "changes"), [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3", {"num_attention_heads": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}),
])  # fmt: skip
def test_logits_equal(saved: Any, tmp_path: Path, family: str, changes: dict[str, Any], kind: Type) -> None:
    """Both sides compute in float32 on the same rounded weights."""
    twin, _ = saved(family, **SIZES | changes)
    path = tmp_path / "model.gguf"
    write(path, family, twin, kind)
    with torch.no_grad():
        expected = torch.cat([twin(torch.tensor([text])).logits[0] for text in TEXTS])
    for tp in (1, 3):
        for logits, *_ in on_threads(tp, logits_of, path):
            assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("kind", "dtype"), [(Type.F16, torch.float16), (Type.Q8_0, torch.float32)])
def test_16_bit_weights_stay_so_and_quantised_ones_become_float32(
    saved: Any, tmp_path: Path, kind: Type, dtype: torch.dtype
) -> None:
    twin, _ = saved("llama", **SIZES)
    write(tmp_path / "model.gguf", "llama", twin, kind)
    model = load(tmp_path / "model.gguf", SingleGroup()).model
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_cut_inside_a_quantised_block_reads_only_the_blocks_it_needs(saved: Any, tmp_path: Path) -> None:
    """3 ranks cut F = 96 into 32, and 16-wide heads inside blocks of 32: those are read by both neighbours."""
    twin, _ = saved("llama", **SIZES)
    path = tmp_path / "model.gguf"
    write(path, "llama", twin, Type.Q8_0)
    for _, weight_bytes, bytes_read in on_threads(3, logits_of, path):
        assert 34 / 32 / 4 * weight_bytes < bytes_read < 0.36 * weight_bytes


@pytest.mark.parametrize(("extra", "said"), [
    (lambda w: w.add_tensor("rope_freqs.weight", np.full(8, 3, dtype=np.float32)), "is not how Llama 3 stretches"),
    (lambda w: w.add_tensor("rope_freqs.weight", np.full(7, 8, dtype=np.float32)), "is not how Llama 3 stretches"),
])  # fmt: skip
def test_another_rotation_is_refused(saved: Any, tmp_path: Path, extra: Extra, said: str) -> None:
    twin, _ = saved("llama", **SIZES)
    write(tmp_path / "model.gguf", "llama", twin, Type.F32, extra)
    with pytest.raises(UnsupportedError, match=said):
        load(tmp_path / "model.gguf", SingleGroup())


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_stretches_its_rotation_by_factors_of_the_file(saved: Any, tmp_path: Path, factor: float) -> None:
    """As llama.cpp's converter computes them, from the base frequencies alone."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    twin, _ = saved("llama", **SIZES | {"head_dim": 64, "max_position_embeddings": 131_072, "rope_parameters": rope})
    waves = 2 * np.pi * 5e5 ** (np.arange(0, 64, 2) / 64)
    smooth = np.clip((8192 / waves - 1.0) / (4.0 - 1.0), 0, 1)
    factors = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    assert len({round(float(value), 3) for value in factors}) > 4
    path = tmp_path / "model.gguf"
    write(path, "llama", twin, Type.F32, lambda w: w.add_tensor("rope_freqs.weight", factors))
    with torch.no_grad():
        expected = torch.cat([twin(torch.tensor([text])).logits[0] for text in TEXTS])
    for logits, *_ in on_threads(3, logits_of, path):
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_rotation_said_to_be_plain_is_no_scaling(saved: Any, tmp_path: Path) -> None:
    def plain(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_factor(1.0)
        writer.add_rope_dimension_count(16)

    twin, _ = saved("llama", **SIZES)
    write(tmp_path / "model.gguf", "llama", twin, Type.F32, plain)
    assert load(tmp_path / "model.gguf", SingleGroup()).model.config.rope_scaling is None


def test_the_vocabulary_may_be_told_by_the_tokens_alone(saved: Any, tmp_path: Path) -> None:
    """llama.cpp's converter writes no vocab_size for some tokenizers."""
    twin, _ = saved("llama", **SIZES)
    tokens = [f"<{i}>" for i in range(SIZES["vocab_size"])]

    def tokens_only(writer: gguf.GGUFWriter) -> None:
        writer.add_token_list(tokens)
        del writer.kv_data[0]["llama.vocab_size"]

    write(tmp_path / "model.gguf", "llama", twin, Type.F32, tokens_only)
    assert load(tmp_path / "model.gguf", SingleGroup()).model.config.vocabulary == len(tokens)


def test_an_unknown_architecture_names_the_known(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    known = "falcon, gemma, gemma2, gemma3, gpt2, gptneox, llama, olmo2, phi3, qwen2, qwen3, stablelm"
    with pytest.raises(UnsupportedError, match=f"'mamba' is not supported; supported are {known}$"):
        load(tmp_path / "model.gguf", SingleGroup())


def test_a_bias_the_model_would_not_use_is_refused(saved: Any, tmp_path: Path) -> None:
    """Qwen2's files call themselves qwen2; a llama file with biases is none of ours."""
    twin, _ = saved("llama", **SIZES)
    bias = np.zeros(64, dtype=np.float32)
    write(tmp_path / "model.gguf", "llama", twin, Type.F32, lambda w: w.add_tensor("blk.0.attn_q.bias", bias))
    with pytest.raises(FileError, match=r"tensor 'blk.0.attn_q.bias' \(1 such\) has no place in a llama model"):
        load(tmp_path / "model.gguf", SingleGroup())
