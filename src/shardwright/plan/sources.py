"""From what the user calls a model to its sizes: a built-in name, a Hugging Face directory or config.json, a GGUF file.

Decides how a config is read whose model this package cannot run. Weights are never looked at.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwright.errors import FileError, UnsupportedError
from shardwright.plan.blocks import Blocks, built_in, of_sizes

KEYS = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "n_embed"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocabulary": ("vocab_size", "padded_vocab_size"),
}
"""What families call the sizes without which there is no plan."""

MOST = 1 << 28
"""No size of a model is larger."""

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def open_model(model: str) -> tuple[str, Blocks]:
    """A name to print, and the sizes.

    Raises:
        UsageError: it is neither a path nor a built-in name; the near ones are listed.
        FileError: a file is damaged or lacks a size.
        UnsupportedError: a mixture of experts.
    """
    path = Path(model)
    if path.suffix in (".gguf", ".json") or ("/" in model and path.exists()) or path.is_dir():
        return path.stem if path.suffix == ".gguf" else str(path), _from_path(path)
    return built_in(model)


def _from_path(path: Path) -> Blocks:
    from shardwright.checkpoint.json_object import read_object
    from shardwright.checkpoint.opening import open_checkpoint
    from shardwright.checkpoint.source import Checkpoint
    from shardwright.models.read import read_config
    from shardwright.plan.declared import of_config

    if path.suffix == ".gguf":
        with open_checkpoint(path) as checkpoint:
            return of_config(read_config(checkpoint)[0])
    file = path if path.suffix == ".json" else path / "config.json"
    said = read_object(file)
    counts = [said.get(key) for key in EXPERTS]
    if any(isinstance(count, int) and count > 1 for count in counts):
        raise UnsupportedError(f"{file}: a mixture of experts; the cost model covers dense models")
    try:
        return of_config(read_config(Checkpoint(str(file), said, {}))[0])
    except UnsupportedError:
        return _from_keys(file, said)


def _from_keys(file: Path, said: Mapping[str, Any]) -> Blocks:
    """The sizes of a family that this package does not run, by the names families give them."""
    sizes = {name: _size(file, said, keys) for name, keys in KEYS.items()}
    heads, hidden = sizes["heads"], sizes["hidden"]
    gated = str(said.get("hidden_act", said.get("hidden_activation", ""))) in ("silu", "swiglu", "gelu_pytorch_tanh")
    kv_heads = _size(file, said, ("num_key_value_heads", "n_head_kv"), 1 if said.get("multi_query") else heads)
    head_size = _size(file, said, ("head_dim",), hidden // heads)
    if heads % kv_heads or not head_size:
        problem = f"{heads} query heads over {kv_heads} KV heads of size {head_size}: a group is whole"
        raise FileError(file, problem, "check the config")
    windowed = said.get("sliding_window") and said.get("use_sliding_window", True)
    return of_sizes(
        **sizes,
        feed_forward=_size(file, said, ("intermediate_size", "ffn_dim", "n_inner"), 4 * hidden),
        kv_heads=kv_heads,
        head_size=head_size,
        gated=int(gated),
        tied=int(bool(said.get("tie_word_embeddings", not gated))),
        window=_size(file, said, ("sliding_window",)) if windowed else 0,
    )


def _size(file: Path, said: Mapping[str, Any], keys: tuple[str, ...], otherwise: int | None = None) -> int:
    for key in keys:
        value = said.get(key)
        if value is None:
            continue
        if type(value) is not int or not 1 <= value <= MOST:
            raise FileError(
                file, f"{key} is {value!r:.60}, no size", "pass the config.json of a decoder-only transformer"
            )
        return value
    if otherwise is None:
        raise FileError(file, f"it has no {keys[0]}", "pass the config.json of a decoder-only transformer")
    return otherwise
