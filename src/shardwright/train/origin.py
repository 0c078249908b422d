"""What a run starts from: a model's config and where its weights are, from a recipe. No torch.

Decides that a config.json is what identifies a model, whether it was read, written in the recipe, or made of a GGUF
file's metadata: it goes into every checkpoint, and out again by `shardwright export`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardwright.checkpoint.opening import open_checkpoint
from shardwright.checkpoint.source import Checkpoint
from shardwright.errors import UsageError
from shardwright.models.config import ModelConfig
from shardwright.models.embedded import embedded_model
from shardwright.models.read import read_config
from shardwright.models.write import huggingface_config
from shardwright.text.tokenizer import Tokenizer
from shardwright.train.recipe import Recipe


@dataclass(frozen=True)
class Origin:
    """config: of the model · json: its config.json · weights: where they are, or None for initial ones."""

    config: ModelConfig
    json: dict[str, Any]
    weights: Path | None


def origin_of(recipe: Recipe, words: int | None = None) -> Origin:
    """The model a recipe names. words: of the tokenizer, where the recipe leaves vocab_size to it.

    Raises:
        FileError, UnsupportedError: the model is damaged, or of a kind not built.
        UsageError: a config without a vocabulary.
    """
    if recipe.model.config is not None:
        return _from_scratch(recipe.model.config, words)
    path = model_path(recipe)
    with open_checkpoint(path) as checkpoint:
        config, _ = read_config(checkpoint)
        gguf = "general.architecture" in checkpoint.config
        return Origin(config, huggingface_config(config) if gguf else dict(checkpoint.config), path)


def config_of(said: dict[str, Any], where: str) -> ModelConfig:
    """What the keys of a config.json say; `where` is for messages."""
    return replace(read_config(Checkpoint(where, said, {}))[0], dtype="float32")


def model_path(recipe: Recipe) -> Path:
    """Where the model of a recipe lies that starts from one."""
    said = recipe.model.path or ""
    return embedded_model() if said == "embedded" else recipe.place(said)


def model_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a directory or a GGUF file."""
    if path.is_dir():
        return Tokenizer.from_directory(path)
    with open_checkpoint(path) as checkpoint:
        return Tokenizer.from_gguf(checkpoint.config, path)


def _from_scratch(said: dict[str, Any], words: int | None) -> Origin:
    if "vocab_size" not in said:
        if words is None:
            problem = "nothing says how many words the model has"
            raise UsageError("model.config.vocab_size", "(not set)", problem, "set it")
        said = {**said, "vocab_size": words}
    config = config_of(said, "recipe's model.config")
    if words is not None and config.vocabulary < words:
        problem = f"the tokenizer has {words} words"
        raise UsageError("model.config.vocab_size", config.vocabulary, problem, "raise it, or leave it out")
    return Origin(config, {"model_type": config.family, **said}, None)
