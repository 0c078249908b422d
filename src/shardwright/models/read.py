"""From what a checkpoint says of its model to a `ModelConfig`: Hugging Face's config.json and GGUF's metadata.

Decides what is believed, what is a default, and what is refused because the decoder would compute something else. Both
forms are brought to Hugging Face's names (GGUF's by `read_gguf`) and checked by the family's schema. Knows no weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from shardwright.checkpoint.source import Checkpoint
from shardwright.errors import FileError, UnsupportedError
from shardwright.models.config import ModelConfig
from shardwright.models.families import by_architecture
from shardwright.models.family import Family, Naming
from shardwright.models.read_gguf import check_rotation, said_by_gguf
from shardwright.models.rope import LongRopeScaling, RopeScaling
from shardwright.models.schema import ACTIVATIONS, ROPES, AnyChecked, Rope, Schema

MAX_HEADS = 100_000
"""Heads of all layers: the table of who holds what has a row for each. MT-NLG, with the most, has 40,000."""


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
    named = architectures[0] if isinstance(architectures, list) else architectures
    family = by_architecture(named, _config_path(checkpoint))
    values = {key: value for key, value in said.items() if key not in family.keys}
    values |= {ours: said[theirs] for ours, theirs in family.keys.items() if theirs in said}
    schema = _validated(family.schema, values, _config_path(checkpoint), family.keys)
    config = _config(family, schema, checkpoint.path, schema.tie_word_embeddings)
    naming = family.naming(config)
    if naming.prefix and f"{naming.bare().names['embedding']}.weight" in checkpoint.entries:
        naming = naming.bare()
    return _with_dtype(config, checkpoint, naming), naming


def _config_path(checkpoint: Checkpoint) -> str:
    return checkpoint.path if checkpoint.path.endswith(".json") else f"{checkpoint.path}/config.json"


def _from_gguf(checkpoint: Checkpoint) -> tuple[ModelConfig, Naming]:
    said = said_by_gguf(checkpoint)
    schema = _validated(said.family.schema, said.values, checkpoint.path, said.shown)
    tied = said.gguf.naming.names["head"] + ".weight" not in checkpoint.entries
    config = _config(said.family, schema, checkpoint.path, tied)
    check_rotation(config, said.gguf, checkpoint)
    naming = said.gguf.naming.of(config.block)
    return _with_dtype(config, checkpoint, naming), naming


def _config(family: Family, schema: Schema, path: str, tied: bool) -> ModelConfig:
    _refuse_what_differs(schema, path)
    heads, size = schema.num_attention_heads, schema.head_size
    whole, local = schema.ropes
    rope = _rope(whole, schema, path)
    said: dict[str, Any] = {
        "family": family.name,
        "hidden": schema.hidden_size,
        "feed_forward": schema.feed_forward,
        "layers": schema.num_hidden_layers,
        "heads": heads,
        "kv_heads": schema.kv_heads,
        "head_size": size,
        "vocabulary": schema.vocab_size,
        "context": schema.max_position_embeddings,
        "norm_eps": schema.rms_norm_eps,
        "rope_theta": rope.rope_theta or schema.rope_theta or schema.theta_by_default,
        "rotary_size": _rotary_size(rope, schema, path),
        "tied": tied,
        "activation": ACTIVATIONS[schema.hidden_act],
    } | schema.traits()
    turned = 0 if said.get("learned_positions") or said.get("alibi") else said["rotary_size"]
    if heads % schema.kv_heads or not size or turned % 2 or turned > size:
        problem = f"{heads} query heads over {schema.kv_heads} KV heads of size {size}, {turned} of it turned"
        raise FileError(path, f"{problem}: a group is whole, and rotary turns pairs", "check its config")
    if schema.num_hidden_layers * (heads + 2 * schema.kv_heads) > MAX_HEADS:
        problem = f"{schema.num_hidden_layers:,} layers of {heads:,} and {schema.kv_heads:,} KV heads are not a model"
        raise FileError(path, problem, "check its config, or download it again")
    if local is not None:
        said["local_rope_theta"] = _plain_theta(local, schema, path)
    return ModelConfig(**said, rope_scaling=_scaling(rope, schema, turned, path) if turned else None)


def _with_dtype(config: ModelConfig, checkpoint: Checkpoint, naming: Naming) -> ModelConfig:
    """The embedding's type; where there are no weights, what the config says of them."""
    said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    entry = checkpoint.entries.get(naming.names["embedding"] + ".weight")
    dtype = entry.dtype if entry else said if not checkpoint.entries else None
    return replace(config, dtype=dtype) if dtype in ("bfloat16", "float16", "float64") else config


def _rope(said: Mapping[str, Any], schema: Schema, path: str) -> Rope:
    where = "rope_scaling" if schema.rope_scaling else "rope_parameters"
    kind = said.get("rope_type", said.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPES:
        known = ", ".join(ROPES)
        raise UnsupportedError(f"{path}: rope_type {kind!r:.60} is not supported; supported are {known}")
    shown = {name: f"{where}.{name}" for name in ROPES[kind].model_fields}
    return _validated(ROPES[kind], {**said, "rope_type": kind}, path, shown)


def _plain_theta(said: Mapping[str, Any], schema: Schema, path: str) -> float:
    """The base of layers with a window, whose angles are never stretched."""
    rope = _rope(said, schema, path)
    if rope.rope_type != "default" or rope.partial_rotary_factor not in (None, 1):
        raise UnsupportedError(
            f"{path}: rope_type {rope.rope_type!r} in layers with a window is not supported; use default"
        )
    return rope.rope_theta or 10_000.0


def _rotary_size(rope: Rope, schema: Schema, path: str) -> int:
    """How many dims of a head are turned: a number in GGUF, a share in config.json, where transformers reads one."""
    if schema.rotary_dims is not None:
        return schema.rotary_dims
    share = rope.partial_rotary_factor
    share = schema.partial_rotary_factor if share is None else share
    if share not in (None, 1) and not schema.reads_rotary_share:
        problem = f"partial_rotary_factor {share} is not supported of this family, whose heads are turned whole"
        raise UnsupportedError(f"{path}: {problem}; use a model of the same family without it")
    return int(schema.head_size * (schema.rotary_by_default if share is None else share))


def _scaling(rope: Rope, schema: Schema, turned: int, path: str) -> RopeScaling | None:
    context = schema.max_position_embeddings
    original = schema.original_max_position_embeddings or rope.original_max_position_embeddings or context
    if (rope.rope_type in ("dynamic", "yarn") and turned <= 2) or original < 2:
        raise FileError(path, f"rope_type {rope.rope_type} over {turned} rotated dims", "check its config")
    low, high = rope.__dict__.get("low_freq_factor", 0), rope.__dict__.get("high_freq_factor", 1)
    if low >= high:
        raise FileError(path, "its rope has low_freq_factor no lower than high_freq_factor", "check its config")
    scaling = rope.scaling(context, original)
    if isinstance(scaling, LongRopeScaling) and {len(scaling.short), len(scaling.long)} != {turned // 2}:
        found = f"{len(scaling.short)} short and {len(scaling.long)} long factors"
        raise FileError(path, f"its rope has {found} for {turned // 2} rotary pairs", "check its config")
    return scaling


def _refuse_what_differs(schema: Schema, path: str) -> None:
    differences = schema.differences()
    if schema.hidden_act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UnsupportedError(f"{path}: activation {schema.hidden_act!r:.60} is not supported; supported are {known}")
    for what, differs in differences.items():
        if differs:
            raise UnsupportedError(f"{path}: {what} is not supported yet; use a model of the same family without it")


def _validated(
    model: type[AnyChecked], values: Mapping[str, object], path: str, shown: Mapping[str, str]
) -> AnyChecked:
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
