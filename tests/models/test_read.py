"""What a config says of rotary embedding, in its newer and older spellings, against how transformers reads it."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from shardwright.checkpoint.source import Checkpoint
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
