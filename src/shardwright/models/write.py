"""A Hugging Face config.json from a `ModelConfig`: the inverse of `models.read`, for models of GGUF files."""

from dataclasses import asdict
from typing import Any

from shardwright.errors import UnsupportedError
from shardwright.models.config import ModelConfig
from shardwright.models.families import by_name

WRITTEN = ("llama", "qwen3")


def huggingface_config(config: ModelConfig) -> dict[str, Any]:
    """What transformers, and `read_config`, make the same model of.

    Raises:
        UnsupportedError: a family whose config is only read so far.
    """
    if config.family not in WRITTEN:
        known = ", ".join(WRITTEN)
        raise UnsupportedError(f"{config.family}: no config.json is written of this family; of {known} it is")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        stretch = asdict(config.rope_scaling)
        rope |= {"rope_type": "llama3", "factor": stretch["factor"]}
        rope |= {"low_freq_factor": stretch["low"], "high_freq_factor": stretch["high"]}
        rope |= {"original_max_position_embeddings": stretch["original"]}
    return {
        "architectures": [by_name(config.family).architecture],
        "model_type": config.family,
        "hidden_size": config.hidden,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": "silu",
    }
