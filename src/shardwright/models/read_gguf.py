"""What a GGUF file says of its model, under the names and in the forms of a config.json, for a schema to check.

Decides which keys are read, what is taken for a rotary scaling, and which keys are refused because the decoder would
compute something else. Keys and conversions are those of llama.cpp: its `convert_hf_to_gguf.py` and the loaders in its
`src/models`. Knows no schema and no weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import isclose
from typing import Any

from shardwright.checkpoint.source import Checkpoint
from shardwright.errors import UnsupportedError
from shardwright.models.config import ModelConfig
from shardwright.models.families import by_gguf_architecture
from shardwright.models.family import GGUF, Family

KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "rotary_dims": "rope.dimension_count",
}
"""A schema's key → GGUF's, behind the architecture's name and a dot."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "expert_count": (0,),
    "rope.scaling.yarn_ext_factor": (-1,),
    "rope.scaling.yarn_attn_factor": (),
    "rope.scaling.yarn_log_multiplier": (0,),
}
"""Keys that change what is computed, and the values with which they do not. A family may read some; others are refused.

`yarn_attn_factor` is YaRN's whole magnitude as the converter writes it, and a factor of it as llama.cpp reads it.
"""

FACTORS = "rope_freqs.weight"
"""Where a Llama keeps what each rotary frequency is divided by."""

LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""Where a Phi-3 keeps the same of long texts, and of short ones."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all of Llama 3.1 to 3.3 have in common; the factor is 8 or 32."""


@dataclass(frozen=True)
class Said:
    """The family, how its files are, values by the schema's keys, and the file's own names of those keys."""

    family: Family
    gguf: GGUF
    values: dict[str, Any]
    shown: dict[str, str]


def said_by_gguf(checkpoint: Checkpoint) -> Said:
    """What its metadata and its tensors' names say; nothing of it is checked but what is refused.

    Raises:
        UnsupportedError: the architecture, or something it asks for, is not built.
    """
    architecture = checkpoint.config["general.architecture"]
    family, gguf = by_gguf_architecture(architecture, checkpoint.path)
    start = f"{architecture}."
    said = {key.removeprefix(start): value for key, value in checkpoint.config.items() if key.startswith(start)}
    keys = {**KEYS, **gguf.keys}
    for key, neutral in NEUTRAL.items():
        if key in said and key not in keys.values() and said[key] not in neutral:
            problem = f"{start}{key} {said[key]!r:.60} is not supported of a {family.name} model"
            raise UnsupportedError(f"{checkpoint.path}: {problem}; use its safetensors")
    values = gguf.implied(checkpoint.entries) | {ours: said[theirs] for ours, theirs in keys.items() if theirs in said}
    if values.get("sliding_window") == 0:
        values["sliding_window"] = None
    tokens = checkpoint.config.get("tokenizer.ggml.tokens")
    if "vocab_size" not in values and isinstance(tokens, tuple):
        values["vocab_size"] = len(tokens)
    if "rotary_dims" not in values:
        values["partial_rotary_factor"] = 1.0
    values["rope_scaling"] = _scaling(checkpoint, said)
    return Said(family, gguf, values, {ours: start + theirs for ours, theirs in keys.items()})


def _scaling(checkpoint: Checkpoint, said: Mapping[str, object]) -> dict[str, Any] | None:
    """As config.json would say it; None where angles are plain."""
    factor = said.get("rope.scaling.factor", said.get("rope.scale_linear")) or 1.0
    kind = said.get("rope.scaling.type", "none" if factor == 1 else "linear")
    magnitude = said.get("rope.scaling.attn_factor")
    tensors = checkpoint.entries
    if FACTORS in tensors and kind == "none":
        return {"rope_type": "llama3", "factor": max(checkpoint.floats(FACTORS), default=0.0), **LLAMA3}
    if {LONG, SHORT} <= tensors.keys() and kind in ("none", "longrope"):
        long, short = list(checkpoint.floats(LONG)), list(checkpoint.floats(SHORT))
        return {"rope_type": "longrope", "long_factor": long, "short_factor": short, "attention_factor": magnitude}
    known = {
        "none": None,
        "linear": {"rope_type": "linear", "factor": factor},
        "yarn": {"rope_type": "yarn", "factor": factor}
        | {key: said.get(f"rope.scaling.yarn_{key}") for key in ("beta_fast", "beta_slow")},
    }
    if kind not in known or magnitude not in (None, 1) or {FACTORS, LONG, SHORT} & tensors.keys():
        problem = f"rotary scaling {kind!r:.60} with these factors is not supported in a GGUF file"
        raise UnsupportedError(f"{checkpoint.path}: {problem}; use its safetensors")
    return known[kind]


def check_rotation(config: ModelConfig, gguf: GGUF, checkpoint: Checkpoint) -> None:
    """Refuse angles that are not what the file asks for.

    Only Llama 3's stretch is known by its factors; 1e-5, since the file has them in float32. Where rows of q and k are
    in the order of GGUF's Llama, heads are turned whole.
    """
    path = checkpoint.path
    if "rope_unpermute" in gguf.naming.transforms.values() and config.turned != config.head_size:
        turned = f"only {config.turned} of {config.head_size} dims of a head are rotated"
        raise UnsupportedError(f"{path}: {turned}, which is not supported of a {config.family} model")
    if FACTORS not in checkpoint.entries:
        return
    stretch = checkpoint.floats(FACTORS)
    plain = replace(config, rope_scaling=None).rope_frequencies()
    expected = [base / ours for base, ours in zip(plain, config.rope_frequencies(), strict=True)]
    if len(expected) != len(stretch) or not all(map(partial(isclose, rel_tol=1e-5), expected, stretch)):
        raise UnsupportedError(f"{path}: {FACTORS} is not how Llama 3 stretches its rotation; use its safetensors")
