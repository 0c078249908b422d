"""What a config says of rotary embedding, in its newer and older spellings, against how transformers reads it."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from shardwright.checkpoint.source import Checkpoint
from shardwright.layers.batch import Batch
from shardwright.models.decoder import rotary_of
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
