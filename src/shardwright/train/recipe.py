"""`Recipe`: what a training run is, as one frozen object read from TOML. No torch.

Decides what a key means, its default and its bounds, and which keys contradict each other. Paths are relative to the
recipe file. `shardwright train --schema` prints these descriptions.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shardwright.errors import FileError, UsageError
from shardwright.text.bpe import FEWEST

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelPart(_Part):
    """Where the model comes from: one of the two."""

    path: str | None = Field(
        None, description="A Hugging Face directory or a GGUF file whose weights training starts from; 'embedded' is "
        "the installed SmolLM2-135M."
    )  # fmt: skip
    config: dict[str, Any] | None = Field(
        None, description="To start from scratch: the keys of a Hugging Face config.json, 'architectures' among them. "
        "vocab_size may be left out: the tokenizer's."
    )  # fmt: skip


class DataPart(_Part):
    """What is learnt."""

    paths: list[str] = Field(
        min_length=1, description="Files, or directories taken with all in them that has a wanted suffix. .jsonl and "
        ".parquet hold a text a record, any other file is one text. 'stdlib': the Python library's own source."
    )  # fmt: skip
    suffixes: list[str] = Field([".txt", ".jsonl", ".parquet"], description="Which files of a directory are taken.")
    field: str = Field("text", description="The field of a JSONL record, or the column, that holds the text.")
    tokenizer: str | int = Field(
        "model", description="'model': the model's own. A path: a directory with tokenizer.json. A number: a BPE of so "
        "many words is trained on the data first."
    )  # fmt: skip
    sequence: Positive = Field(256, description="Tokens of a packed sequence.")
    validation: float = Field(0.01, ge=0, le=0.5, description="Share of the sequences kept for evaluation, the last.")


class TrainPart(_Part):
    """How long, in which steps, in which numbers."""

    steps: Positive = Field(description="Optimiser steps in all.")
    batch: Positive = Field(description="Sequences of a step, over all ranks.")
    micro_batch: Positive = Field(4, description="Sequences of one forward and backward of a rank; a step accumulates.")
    seed: Count = Field(0, description="Of initial values, data order and dropout.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of weights and activations; bfloat16 keeps float32 master weights and gradients."
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="selective: attention's core and the gated activation are computed again in the backward; "
        "full: whole blocks. Neither repeats a collective of the forward."
    )  # fmt: skip
    dropout: float = Field(0.0, ge=0, lt=1, description="On what is added to the residual stream.")
    attention_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="On attention's weights, which are then computed one by one: slower, and more memory.",
    )


class OptimizerPart(_Part):
    """AdamW, and its learning rate over the steps: linear warm-up, then half a cosine."""

    lr: float = Field(3e-4, gt=0, description="The highest learning rate.")
    min_lr: float = Field(0.0, ge=0, description="The last learning rate.")
    warmup: Count = Field(0, description="Steps of linear warm-up.")
    betas: tuple[Share, Share] = Field((0.9, 0.95), strict=False, description="Of AdamW's two averages.")
    eps: float = Field(1e-8, gt=0, description="Of AdamW.")
    weight_decay: float = Field(0.1, ge=0, description="Of matrices; norms and biases have none.")
    clip: float = Field(1.0, ge=0, description="Largest norm of the whole gradient; 0 for no clipping.")


class ParallelPart(_Part):
    """How many ranks, and how they share the work."""

    tensor: Positive = Field(1, description="Ranks that share each layer; any number.")
    pipeline: Positive = Field(1, description="Stages; only 1 is built.")
    data: Positive = Field(1, description="Ranks (or tensor groups) that see different sequences.")
    sequence: bool = Field(False, description="Deal out the rows between blocks too: less memory, the same bytes.")
    zero: bool = Field(True, description="Each data rank keeps only its share of the optimiser's state (ZeRO-1).")
    compression: Literal["none", "bf16", "int8", "1bit"] = Field(
        "none",
        description="Of gradients between data ranks, with error feedback. 1bit: AdamW's second moment stays "
        "as the uncompressed steps left it (1-bit Adam).",
    )
    uncompressed_steps: Count = Field(100, description="First steps that are not compressed.")


class OutputPart(_Part):
    """What a run leaves behind, and how often."""

    directory: str = Field(description="Checkpoints, metrics.jsonl, curve.png, tokenizer. A run found there goes on.")
    save_every: Count = Field(0, description="Steps between checkpoints; 0: only the last step's.")
    keep: Positive = Field(2, description="Complete checkpoints kept.")
    log_every: Positive = Field(10, description="Steps between progress lines.")
    evaluate_every: Count = Field(0, description="Steps between evaluations; 0: only after the last step.")
    evaluate_sequences: Positive = Field(64, description="Most sequences of an evaluation.")
    sample_every: Count = Field(0, description="Steps between samples of text; 0: none.")
    sample_prompt: str = Field("", description="What a sample continues.")
    sample_tokens: Positive = Field(64, description="Tokens of a sample.")
    tensorboard: bool = Field(False, description="Write TensorBoard events too, beside metrics.jsonl.")


class GuardPart(_Part):
    """What happens when a step goes wrong, or a rank; the first module and rank are named."""

    nonfinite: Literal["skip", "stop"] = Field("stop", description="When loss or gradient is no finite number.")
    spike: float = Field(0.0, ge=0, description="A loss above so many times the recent median is a spike; 0: none is.")
    on_spike: Literal["skip", "stop"] = Field("skip", description="When the loss spikes.")
    progress_timeout: float = Field(
        120.0, gt=0, description="Seconds that a rank which shows no life, stopped or stuck, may keep the others "
        "waiting before the run ends."
    )  # fmt: skip


class Recipe(_Part):
    """A training run."""

    model: ModelPart
    data: DataPart
    train: TrainPart
    output: OutputPart
    optimizer: OptimizerPart = OptimizerPart()  # type: ignore[call-arg]
    parallel: ParallelPart = ParallelPart()  # type: ignore[call-arg]
    guard: GuardPart = GuardPart()  # type: ignore[call-arg]
    home: str = Field(".", description="Set to the recipe file's directory when it is read.")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a TOML file.

        Raises:
            FileError: it is missing or no TOML.
            UsageError: a key is unknown, missing, out of bounds, or contradicts another one.
        """
        try:
            text = Path(path).read_bytes().decode()
            values = tomllib.loads(text)
        except OSError as error:
            raise FileError(path, f"it cannot be read: {error.strerror}", "check the path") from None
        except ValueError as error:
            raise FileError(path, f"it is not TOML: {error}", "see shardwright train --schema") from None
        return cls.of({"home": str(Path(path).absolute().parent), **values})

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """From plain values, checked."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _wrong(error) from None

    def place(self, path: str) -> Path:
        """A path of the recipe, from where the recipe lies."""
        return Path(self.home) / path

    @property
    def directory(self) -> Path:
        """Where the run leaves what it makes."""
        return self.place(self.output.directory)

    @property
    def ranks(self) -> int:
        """How many ranks the run takes."""
        return self.parallel.tensor * self.parallel.pipeline * self.parallel.data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.model.path is None) == (self.model.config is None):
            raise UsageError("model", "path and config", "exactly one of them is given", "drop the other one")
        if self.parallel.pipeline != 1:
            remedy = "use parallel.tensor and parallel.data"
            raise UsageError("parallel.pipeline", self.parallel.pipeline, "only one stage is trained so far", remedy)
        if self.optimizer.warmup > self.train.steps:
            limit = f"there are only {self.train.steps} steps"
            raise UsageError("optimizer.warmup", self.optimizer.warmup, limit, "shorten the warm-up")
        if self.optimizer.min_lr > self.optimizer.lr:
            problem = f"it is above optimizer.lr={self.optimizer.lr}"
            raise UsageError("optimizer.min_lr", self.optimizer.min_lr, problem, "lower it")
        if self.parallel.compression == "1bit" and not self.parallel.uncompressed_steps:
            problem = "signs say nothing of how large a gradient is, which AdamW learns from the first steps"
            raise UsageError("parallel.uncompressed_steps", 0, problem, "use some tens")
        for key, value in dropouts(self.model.config or {}).items():
            remedy = "set train.dropout and train.attention_dropout, and leave this out"
            raise UsageError(f"model.config.{key}", value, "no dropout is taken from a model's config", remedy)
        if self.model.config is not None and self.data.tokenizer == "model":
            problem = "a model from scratch has no tokenizer"
            raise UsageError("data.tokenizer", "model", problem, "give a path, or the words of one to train")
        if self.model.path is not None and isinstance(self.data.tokenizer, int):
            problem = "a trained model knows its own tokens only"
            raise UsageError("data.tokenizer", self.data.tokenizer, problem, "use 'model'")
        if isinstance(self.data.tokenizer, int) and self.data.tokenizer < FEWEST:
            problem = "every byte is a word, and so is the end of a text"
            raise UsageError("data.tokenizer", self.data.tokenizer, problem, f"use at least {FEWEST}")
        if self.output.sample_every and not self.output.sample_prompt:
            raise UsageError("output.sample_prompt", "''", "a sample continues some text", "give a prompt")
        return self


def dropouts(config: Mapping[str, Any]) -> dict[str, float]:
    """The dropouts that a config.json asks for, by key: no run applies them, and none keeps silent about it."""
    return {
        key: value
        for key, value in config.items()
        if key.endswith(("dropout", "pdrop", "dropout_prob")) and isinstance(value, int | float) and value > 0
    }


def _wrong(error: ValidationError) -> UsageError:
    """The first thing wrong, on one line."""
    unknown = [each for each in error.errors() if each["type"] == "extra_forbidden"]
    first = (unknown or error.errors())[0]  # a misspelt key says more than the one that is missed for it
    own = first.get("ctx", {}).get("error")
    if isinstance(own, UsageError):
        return own
    key = ".".join(map(str, first["loc"])) or "recipe"
    if first["type"] == "extra_forbidden":
        return UsageError(key, repr(first["input"]), "there is no such key", "see shardwright train --schema")
    if first["type"] == "missing":
        return UsageError(key, "(not set)", "it is required", "see shardwright train --schema")
    shown = repr(first["input"])
    shown = shown if len(shown) < 60 else f"{shown[:59]}…"
    return UsageError(key, shown, first["msg"].lower(), "see shardwright train --schema")
