"""What a config says of rotary embedding, in its newer and older spellings, against how transformers reads it."""

from typing import Any

import pytest
import torch
import transformers
from tests.models.conftest import CLASSES
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from shardwright.checkpoint.source import Checkpoint
from shardwright.errors import UnsupportedError
from shardwright.layers.batch import Batch
from shardwright.models.decoder import rotary_of
from shardwright.models.families import FAMILIES, Family
from shardwright.models.read import read_config

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 5,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "vocab_size": 7,
    "max_position_embeddings": 640,
}
STRETCH = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FACTORS = {"short_factor": [1 + i / 9 for i in range(16)], "long_factor": [2.0 + i for i in range(16)]}
FULL = STRETCH | {"original_max_position_embeddings": 64}


def frequencies(said: dict[str, Any]) -> tuple[float, ...]:
    config, _ = read_config(Checkpoint("there", {"architectures": ["LlamaForCausalLM"]} | said, {}))
    return config.rope_frequencies()


@pytest.mark.parametrize("rope", [
    {},
    {"rope_theta": 777.0},
    {"rope_parameters": None, "rope_theta": 777},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 333.0}, "rope_theta": 777.0},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 333.0, **FULL}},
    {"rope_parameters": {"type": "llama3", "rope_theta": 333.0, **FULL}},
    {"rope_scaling": None, "rope_theta": 777.0},
    {"rope_scaling": {"type": "llama3", **FULL}, "rope_theta": 777.0},
    {"rope_scaling": {"rope_type": "llama3", "type": "linear", **FULL}},
    {"rope_scaling": {"rope_type": "llama3", **STRETCH}},
    {"rope_scaling": {"rope_type": "llama3", **FULL}, "original_max_position_embeddings": 32},
    {"rope_scaling": {"rope_type": "llama3", **FULL}, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
    {"rope_scaling": {"rope_type": "llama3", **FULL, "factor": 2, "low_freq_factor": 0.5, "high_freq_factor": 1.5}},
])  # fmt: skip
def test_rotary_frequencies_are_those_of_transformers(rope: dict[str, Any]) -> None:
    """To 1e-5 of each: transformers computes them in float32."""
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SIZES, **{key: _copied(value) for key, value in rope.items()})).inv_freq
    ours = torch.tensor(frequencies(SIZES | rope))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def _copied(value: Any) -> Any:
    """Transformers writes into the dicts it is given."""
    return dict(value) if isinstance(value, dict) else value


SCALED: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4},
    {"rope_type": "dynamic", "factor": 2.5},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "truncate": False},
    {"rope_type": "yarn", "factor": 8.0, "beta_fast": 9.0, "beta_slow": 2.0, "attention_factor": 0.7},
    {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    {"rope_type": "yarn", "factor": 0.5},
    {"rope_type": "longrope", "factor": 10.0, "original_max_position_embeddings": 64, **FACTORS},
    {"rope_type": "longrope", "factor": 0.5, **FACTORS},
    {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
        "factor": 4.0,
        "attention_factor": 1.5,
        **FACTORS,
    },
]


@pytest.mark.parametrize("length", [10, 640, 700, 5000])
@pytest.mark.parametrize("rope", SCALED)
def test_scaled_angles_are_those_of_transformers(rope: dict[str, Any], length: int) -> None:
    """The end of a text of that length, to 1e-4 of cos and sin: transformers computes frequencies in float32."""
    said = SIZES | {"rope_parameters": {"rope_theta": 10_000.0, **rope}}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SIZES, rope_parameters=dict(said["rope_parameters"])))
    positions = torch.arange(length)
    config, _ = read_config(Checkpoint("there", {"architectures": ["LlamaForCausalLM"]} | said, {}))
    batch = Batch(positions * 0, positions, (length,), (length,))
    cos, sin = rotary_of(config).of(batch, torch.float32)
    expected = theirs(torch.zeros(1), positions[None])
    for ours, whole in zip((cos, sin), expected, strict=True):
        tolerance = 1e-4 * max(1, length / 640)
        torch.testing.assert_close(ours[-5:], whole[0, -5:, : ours.shape[1]], rtol=0, atol=tolerance)


COMMON = {"hidden_size": 12, "intermediate_size": 5, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 7}
NAMED_OTHERWISE = {"n_embd": 12, "n_head": 3, "n_layer": 2, "vocab_size": 7}


@pytest.mark.parametrize(("architecture", "said", "refused"), [
    ("MistralForCausalLM", {"layer_types": ["full_attention", "sliding_attention"]}, "alternating layer_types"),
    ("Qwen2ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types ['full_attention']"),
    ("Gemma2ForCausalLM", {"layer_types": ["chunked_attention"] * 2}, "layer_types ['chunked_attention'"),
    ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "bidirectional attention"),
    ("Gemma3ForCausalLM", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
     "rope_type 'linear' in layers with a window"),
    ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("Qwen3ForCausalLM", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ("FalconForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("FalconForCausalLM", {"new_decoder_architecture": True, "parallel_attn": False}, "new_decoder_architecture"),
    ("FalconForCausalLM", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn 2 without"),
    ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True, **NAMED_OTHERWISE}, "scale_attn_by_inverse_layer"),
    ("GPT2LMHeadModel", {"add_cross_attention": True, **NAMED_OTHERWISE}, "cross-attention"),
    ("OPTForCausalLM", {"do_layer_norm_before": False, "ffn_dim": 5}, "do_layer_norm_before false"),
    ("OPTForCausalLM", {"word_embed_proj_dim": 6, "ffn_dim": 5}, "word_embed_proj_dim"),
    ("OPTForCausalLM", {"layer_norm_elementwise_affine": False, "ffn_dim": 5}, "layer_norm_elementwise_affine false"),
])  # fmt: skip
def test_what_a_family_computes_otherwise_is_refused(architecture: str, said: dict[str, Any], refused: str) -> None:
    config = {"architectures": [architecture], **COMMON, **said}
    with pytest.raises(UnsupportedError) as caught:
        read_config(Checkpoint("there", config, {}))
    assert f"there: {refused[:20]}" in str(caught.value)
    assert refused in str(caught.value)


@pytest.mark.parametrize(("architecture", "said", "expected"), [
    ("Qwen2ForCausalLM", {"sliding_window": 2, "max_window_layers": 0}, {"windows": (), "qkv_bias": True}),
    ("MistralForCausalLM", {"num_attention_heads": 8, "hidden_size": 32}, {"windows": (4096, 4096), "kv_heads": 8}),
    ("Gemma2ForCausalLM", {}, {"head_size": 256, "windows": (4096, 0), "score_cap": 50.0, "logit_cap": 30.0,
                               "activation": "gelu_tanh", "tied": True, "score_scale": 1 / 16}),
    ("Gemma3ForCausalLM", {"rope_theta": 5e5, "rope_local_base_freq": 7.0},
     {"rope_theta": 5e5, "local_rope_theta": 7.0, "windows": (4096, 4096), "score_cap": 0.0}),
    ("Gemma3ForCausalLM", {}, {"rope_theta": 1e6, "local_rope_theta": 1e4}),
    ("StableLmForCausalLM", {"hidden_size": 24}, {"rotary_size": 2, "norm_eps": 1e-5}),
    ("GPTNeoXForCausalLM", {"rotary_pct": 1.0, "rotary_emb_base": 33}, {"rotary_size": 4, "rope_theta": 33.0}),
    ("FalconForCausalLM", {}, {"kv_heads": 1, "block": "parallel_shared", "tied": True}),
    ("FalconForCausalLM", {"ffn_hidden_size": 9}, {"feed_forward": 9}),
    ("GPT2LMHeadModel", NAMED_OTHERWISE, {"feed_forward": 48, "learned_positions": 1024, "turned": 0}),
    ("GPT2LMHeadModel", {**NAMED_OTHERWISE, "scale_attn_weights": False}, {"scale": 1.0}),
    ("OPTForCausalLM", {"ffn_dim": 5, "max_position_embeddings": 9}, {"learned_positions": 11, "position_offset": 2}),
])  # fmt: skip
def test_defaults_are_those_of_transformers(architecture: str, said: dict[str, Any], expected: dict[str, Any]) -> None:
    """What published configs leave out, and older spellings."""
    common = {key: value for key, value in COMMON.items() if architecture != "FalconForCausalLM" or "inter" not in key}
    config, _ = read_config(Checkpoint("there", {"architectures": [architecture], **common, **said}, {}))
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_context_left_out_is_that_of_transformers(family: Family) -> None:
    """It ends texts, and some rotary scalings go by it."""
    theirs = CLASSES[family.name]
    eight = COMMON | {"hidden_size": 64, "num_attention_heads": 8, "ffn_dim": 5}
    sizes = NAMED_OTHERWISE if family.name == "gpt2" else eight
    config, _ = read_config(Checkpoint("there", {"architectures": [theirs], **sizes}, {}))
    assert config.context == getattr(transformers, theirs).config_class().max_position_embeddings
