"""From what a checkpoint says of its model to a `ModelConfig`: Hugging Face's config.json and GGUF's metadata.

Decides what is believed, what is a default, and what is refused because the decoder would compute something else. Both
forms are brought to Hugging Face's names and checked by one schema. Knows no weights.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shardwright.checkpoint.source import Checkpoint
from shardwright.errors import FileError, UnsupportedError
from shardwright.models.config import ModelConfig, RopeScaling
from shardwright.models.families import Family, Naming, by_architecture, by_gguf_architecture

RENAMED = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
"""Hugging Face's key → GGUF's, behind the architecture's name and a dot."""


Checked = TypeVar("Checked", bound=BaseModel)


class _Rope(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    rope_type: str
    rope_theta: float | None = Field(default=None, gt=0)
    partial_rotary_factor: float = 1.0


class _Llama3Rope(_Rope):
    factor: float = Field(gt=0)
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int | None = Field(default=None, ge=1)


class _Schema(BaseModel):
    """The keys the decoder depends on; every other one is passed over."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    hidden_size: int = Field(ge=1, le=1 << 20)
    intermediate_size: int = Field(ge=1, le=1 << 24)
    num_hidden_layers: int = Field(ge=1, le=10_000)
    num_attention_heads: int = Field(ge=1, le=1 << 16)
    num_key_value_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=2, le=1 << 16)
    vocab_size: int = Field(ge=1, le=1 << 28)
    max_position_embeddings: int = Field(default=2048, ge=1)
    original_max_position_embeddings: int | None = Field(default=None, ge=1)
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    rope_theta: float | None = Field(default=None, gt=0)
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    partial_rotary_factor: float = 1.0
    quantization_config: dict[str, Any] | None = None


def read_config(checkpoint: Checkpoint) -> tuple[ModelConfig, Naming]:
    """The model's configuration, and how this checkpoint names its tensors.

    Raises:
        FileError: a key is missing or makes no sense.
        UnsupportedError: the architecture, or something it asks for, is not built.
    """
    if "general.architecture" in checkpoint.config:
        return _from_gguf(checkpoint)
    return _from_huggingface(checkpoint)


def _from_huggingface(checkpoint: Checkpoint) -> tuple[ModelConfig, Naming]:
    said = checkpoint.config
    architectures = said.get("architectures") or ["(none named in config.json)"]
    family = by_architecture(architectures[0] if isinstance(architectures, list) else architectures)
    schema = _validated(_Schema, said, f"{checkpoint.path}/config.json", {})
    _refuse_what_differs(schema, checkpoint.path)
    embedding = family.huggingface.names["embedding"] + ".weight"
    tied = schema.tie_word_embeddings
    return _config(family, schema, checkpoint, embedding, tied), family.huggingface


def _from_gguf(checkpoint: Checkpoint) -> tuple[ModelConfig, Naming]:
    said = checkpoint.config
    architecture = said["general.architecture"]
    family = by_gguf_architecture(architecture)
    keys = {ours: f"{architecture}.{theirs}" for ours, theirs in RENAMED.items()}
    values = {ours: said[theirs] for ours, theirs in keys.items() if theirs in said}
    tokens = said.get("tokenizer.ggml.tokens")
    if "vocab_size" not in values and isinstance(tokens, tuple):
        values["vocab_size"] = len(tokens)
    schema = _validated(_Schema, values, checkpoint.path, keys)
    plain = {"rope.scaling.type": ("none",), "rope.scaling.factor": (0, 1), "rope.scale_linear": (0, 1)}
    scaled = [key for key, values in plain.items() if said.get(f"{architecture}.{key}", values[0]) not in values]
    if scaled or "rope_freqs.weight" in checkpoint.entries:
        raise UnsupportedError(
            f"{checkpoint.path}: rotary scaling in a GGUF file is not supported; use its safetensors"
        )
    turned = said.get(f"{architecture}.rope.dimension_count", _head_size(schema))
    if turned != _head_size(schema):
        raise UnsupportedError(f"{checkpoint.path}: only {turned} of {_head_size(schema)} dims of a head are rotated")
    tied = family.gguf.names["head"] + ".weight" not in checkpoint.entries
    embedding = family.gguf.names["embedding"] + ".weight"
    return _config(family, schema, checkpoint, embedding, tied), family.gguf


def _config(family: Family, schema: _Schema, checkpoint: Checkpoint, embedding: str, tied: bool) -> ModelConfig:
    theta, scaling = _rope(schema, checkpoint.path)
    heads, kv_heads = schema.num_attention_heads, schema.num_key_value_heads or schema.num_attention_heads
    if heads % kv_heads or _head_size(schema) % 2 or not _head_size(schema):
        problem = f"{heads} query heads over {kv_heads} KV heads of size {_head_size(schema)}"
        raise FileError(checkpoint.path, f"{problem}: a group is whole, and rotary turns pairs", "check its config")
    entry = checkpoint.entries.get(embedding)
    return ModelConfig(
        family=family.name,
        hidden=schema.hidden_size,
        feed_forward=schema.intermediate_size,
        layers=schema.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=_head_size(schema),
        vocabulary=schema.vocab_size,
        context=schema.max_position_embeddings,
        norm_eps=schema.rms_norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        tied=tied,
        qk_norm=family.qk_norm,
        qkv_bias=schema.attention_bias,
        out_bias=schema.attention_bias,
        mlp_bias=schema.mlp_bias,
        dtype=entry.dtype if entry and entry.dtype in ("bfloat16", "float16", "float64") else "float32",
    )


def _head_size(schema: _Schema) -> int:
    return schema.head_dim or schema.hidden_size // schema.num_attention_heads


def _rope(schema: _Schema, path: str) -> tuple[float, RopeScaling | None]:
    """Base and stretch, from `rope_parameters` or its older form `rope_scaling`, which wins, as in transformers."""
    where = "rope_scaling" if schema.rope_scaling else "rope_parameters"
    said = dict(schema.rope_scaling or schema.rope_parameters or {})
    said["rope_type"] = kind = said.get("rope_type", said.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UnsupportedError(f"{path}: rope_type {kind!r:.60} is not supported; supported are default, llama3")
    shown = {name: f"{where}.{name}" for name in _Llama3Rope.model_fields}
    rope = _validated(_Rope if kind == "default" else _Llama3Rope, said, path, shown)
    _refuse_partial_rotary(rope.partial_rotary_factor, path)
    theta = rope.rope_theta or schema.rope_theta or 10_000.0
    if not isinstance(rope, _Llama3Rope):
        return theta, None
    if rope.low_freq_factor >= rope.high_freq_factor:
        raise FileError(path, f"{where} has low_freq_factor no lower than high_freq_factor", "check its config")
    return theta, RopeScaling(
        factor=rope.factor,
        low=rope.low_freq_factor,
        high=rope.high_freq_factor,
        original=schema.original_max_position_embeddings
        or rope.original_max_position_embeddings
        or schema.max_position_embeddings,
    )


def _refuse_partial_rotary(factor: float, path: str) -> None:
    if factor != 1:
        raise UnsupportedError(f"{path}: partial_rotary_factor {factor} is not supported; whole heads are rotated")


def _refuse_what_differs(schema: _Schema, path: str) -> None:
    _refuse_partial_rotary(schema.partial_rotary_factor, path)
    differences = {
        f"hidden_act '{schema.hidden_act}'": schema.hidden_act != "silu",
        "sliding-window attention": schema.use_sliding_window or set(schema.layer_types or []) - {"full_attention"},
        "quantised safetensors (quantization_config)": schema.quantization_config is not None,
    }
    for what, differs in differences.items():
        if differs:
            raise UnsupportedError(f"{path}: {what} is not supported yet; use a model of the same family without it")


def _validated(model: type[Checked], values: Mapping[str, object], path: str, shown: Mapping[str, str]) -> Checked:
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise _wrong(error, path, shown) from None


def _wrong(error: ValidationError, path: str, shown: Mapping[str, str]) -> FileError:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    found = "" if first["type"] == "missing" else f" is {first['input']!r:.60}:"
    return FileError(
        path, f"{shown.get(key, key)}{found} {first['msg'].lower()}", "check the file, or download it again"
    )
