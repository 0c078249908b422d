"""Every family that llama.cpp has, from GGUF files as its converter writes them, against transformers.

float32 logits within 1e-4 of the largest, for the reason given in `test_transformers`; at TP 1 and 3, which divides
nothing. Where transformers opens such files itself, it is the second oracle, that shares no line with the writer's.
"""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.converter import Extra, nothing, write
from tests.models.test_families import (
    FALCON,
    GPT2,
    GROUPED,
    GROUPED_FALCON,
    LONGROPE,
    SCALINGS,
    SMALL,
    TEXTS,
    WIDE,
)
from tests.models.test_transformers import FLOAT32, loaded_logits, reference_logits
from transformers import AutoModelForCausalLM

from shardwright.checkpoint.source import Checkpoint
from shardwright.comm.single import SingleGroup
from shardwright.errors import FileError, UnsupportedError
from shardwright.models.families import FAMILIES
from shardwright.models.load import load
from shardwright.models.read import read_config
from shardwright.models.read_gguf import KEYS, NEUTRAL
from shardwright.testing.ranks import on_threads

YARN = SCALINGS[3]
STRETCHED = SMALL | {"max_position_embeddings": 48}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SMALL),
    "llama, linear": ("llama", STRETCHED | {"rope_parameters": SCALINGS[0]}),
    "llama, yarn": ("llama", STRETCHED | {"rope_parameters": YARN}),
    "mistral": ("mistral", GROUPED | {"sliding_window": None}),
    "qwen2": ("qwen2", SMALL),
    "qwen2, yarn": ("qwen2", STRETCHED | {"rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 2.0}}),
    "qwen3": ("qwen3", GROUPED),
    "phi3": ("phi3", SMALL | {"sliding_window": 5, "original_max_position_embeddings": 64}),
    "phi3, longrope": (
        "phi3",
        WIDE | {"original_max_position_embeddings": 12, "partial_rotary_factor": 0.5, "rope_parameters": LONGROPE},
    ),
    "gemma": ("gemma", SMALL),
    "gemma2": ("gemma2", GROUPED | {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3", SMALL | {"sliding_window": 3, "query_pre_attn_scalar": 6, "num_hidden_layers": 7}),
    "gemma3, linear": (
        "gemma3",
        GROUPED
        | {"sliding_window": 3, "query_pre_attn_scalar": 8, "num_hidden_layers": 7}
        | {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}},
    ),
    "olmo2": ("olmo2", GROUPED),
    "stablelm": ("stablelm", WIDE | {"partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "stablelm side by side": ("stablelm", WIDE | {"use_parallel_residual": True}),
    "stablelm with a norm for each head": ("stablelm", WIDE | {"use_parallel_residual": True, "qk_layernorm": True}),
    "gpt_neox": ("gpt_neox", SMALL | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.7}}),
    "gpt_neox in turn": ("gpt_neox", WIDE | {"use_parallel_residual": False}),
    "falcon 7b": ("falcon", FALCON),
    "falcon 40b": ("falcon", FALCON | GROUPED_FALCON),
    "falcon 11b": ("falcon", FALCON | {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    "gpt2": ("gpt2", GPT2 | {"n_inner": None}),
}
BY_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SMALL),
    "qwen2": ("qwen2", SMALL),
    "qwen3": ("qwen3", SMALL | {"head_dim": 128}),
    "phi3": ("phi3", SMALL | {"vocab_size": 32001, "original_max_position_embeddings": 64}),
    "gemma2": ("gemma2", SMALL | {"sliding_window": 4, "head_dim": 256}),
    "gemma3": ("gemma3", SMALL | {"sliding_window": 3, "head_dim": 256, "num_hidden_layers": 7}),
    "stablelm": ("stablelm", WIDE | {"use_qkv_bias": True}),
    "stablelm side by side": ("stablelm", WIDE | {"use_parallel_residual": True}),
    "falcon 7b": ("falcon", FALCON),
    "gpt2": ("gpt2", GPT2 | {"n_inner": None, "n_positions": 1024}),
}
"""Sizes that transformers' reading of GGUF does not lose: it has no key for others."""
QUANTISED: dict[str, tuple[str, dict[str, Any]]] = {
    "fused": ("phi3", SMALL | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}),
    "by KV head": ("falcon", FALCON | GROUPED_FALCON | {"hidden_size": 96}),
    "transposed": ("gpt2", GPT2 | {"n_embd": 160, "n_inner": None}),
}
"""Rows of whole blocks, which 3 ranks cut inside."""


@pytest.mark.parametrize(("family", "sizes"), VARIANTS.values(), ids=VARIANTS)
def test_logits_equal(saved: Any, tmp_path: Path, family: str, sizes: dict[str, Any]) -> None:
    check(saved(family, **sizes)[0], tmp_path / "model.gguf", family)


@pytest.mark.parametrize(("family", "sizes"), QUANTISED.values(), ids=QUANTISED)
def test_quantised_rows_in_any_order(saved: Any, tmp_path: Path, family: str, sizes: dict[str, Any]) -> None:
    check(saved(family, **sizes)[0], tmp_path / "model.gguf", family, Type.Q8_0)


def check(model: Any, path: Path, family: str, kind: Type = Type.F32) -> None:
    write(path, family, model, kind)
    expected = reference_logits(model, TEXTS)
    for tp in (1, 3):
        for logits in on_threads(tp, loaded_logits, str(path), TEXTS):
            assert (logits - expected).abs().max() <= FLOAT32 * expected.abs().max()


@pytest.mark.parametrize(("family", "sizes"), BY_TRANSFORMERS.values(), ids=BY_TRANSFORMERS)
def test_transformers_reads_the_same(saved: Any, tmp_path: Path, family: str, sizes: dict[str, Any]) -> None:
    model, _ = saved(family, **sizes)
    words = [f"<{i}>" for i in range(model.config.vocab_size)]
    write(tmp_path / "model.gguf", family, model, extra=lambda writer: writer.add_token_list(words))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    expected = reference_logits(theirs.eval(), TEXTS)
    for logits in on_threads(3, loaded_logits, str(tmp_path / "model.gguf"), TEXTS):
        assert (logits - expected).abs().max() <= FLOAT32 * expected.abs().max()


def test_every_family_that_has_gguf_files_is_here() -> None:
    """OPT has none; Mistral's are a Llama's."""
    assert {family for family, _ in VARIANTS.values()} == {family.name for family in FAMILIES if family.gguf} | {
        "mistral"
    }


@pytest.mark.parametrize(("family", "sizes", "extra", "said"), [
    ("llama", SMALL, lambda w: w.add_sliding_window(4096), r"llama.attention.sliding_window 4096 is not supported"),
    ("olmo2", GROUPED, lambda w: w.add_sliding_window(4096), r"olmo2.attention.sliding_window 4096 is not supported"),
    ("llama", SMALL, lambda w: w.add_expert_count(8), r"llama.expert_count 8 is not supported of a llama model"),
    ("llama", SMALL, lambda w: w.add_rope_scaling_yarn_attn_factor(1.5), r"yarn_attn_factor 1.5 is not supported"),
    ("llama", SMALL, lambda w: w.add_rope_scaling_attn_factors(1.5), r"rotary scaling 'none' with these factors"),
    ("llama", SMALL, lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), r"'longrope' with these"),
    ("llama", SMALL, lambda w: w.add_rope_dimension_count(4), r"only 4 of 6 dims of a head are rotated"),
])  # fmt: skip
def test_what_would_be_computed_otherwise_is_refused(
    saved: Any, tmp_path: Path, family: str, sizes: dict[str, Any], extra: Extra, said: str
) -> None:
    write(tmp_path / "model.gguf", family, saved(family, **sizes)[0], extra=extra)
    with pytest.raises(UnsupportedError, match=said):
        load(tmp_path / "model.gguf", SingleGroup())


@pytest.mark.parametrize(("layers", "by"), [(46, 36 // 6), (45, 8)])
def test_the_largest_gemma_scores_by_its_width(saved: Any, tmp_path: Path, layers: int, by: int) -> None:
    """As llama.cpp's loader knows the model of 27B by its layers; no key says so."""
    model, _ = saved("gemma2", **GROUPED | {"num_hidden_layers": layers, "intermediate_size": 2})
    write(tmp_path / "model.gguf", "gemma2", model, extra=nothing)
    assert load(tmp_path / "model.gguf", SingleGroup()).model.config.score_scale == by**-0.5


SCALING = ("factor", "type", "attn_factor", "yarn_beta_fast", "yarn_beta_slow", "original_context_length")
NUMBERS = st.one_of(st.integers(-2, 2**63 - 1), st.floats(width=32), st.sampled_from([1, 2, 8, 64]))
VALUES = st.one_of(NUMBERS, st.booleans(), st.text(max_size=5), st.sampled_from(["yarn", "linear"]), st.tuples(NUMBERS))


@given(
    architecture=st.sampled_from(sorted(family.gguf.architecture for family in FAMILIES if family.gguf)),
    said=st.dictionaries(
        st.sampled_from([*KEYS.values(), *NEUTRAL, *(f"rope.scaling.{key}" for key in SCALING)]), VALUES, max_size=9
    ),
    sound=st.booleans(),
)
@settings(max_examples=400)
def test_whatever_the_keys_say_is_read_or_refused(architecture: str, said: dict[str, Any], sound: bool) -> None:
    plain = {"embedding_length": 8, "feed_forward_length": 8, "block_count": 2, "attention.head_count": 2}
    keys = {f"{architecture}.{key}": value for key, value in ((plain if sound else {}) | said).items()}
    checkpoint = Checkpoint("x.gguf", {"general.architecture": architecture, **keys}, {})
    refusal = "x.gguf"
    try:
        read_config(checkpoint)[0].rope_frequencies(9)
    except (FileError, UnsupportedError) as error:
        refusal = str(error)
    assert refusal.startswith("x.gguf")
    assert "\n" not in refusal
