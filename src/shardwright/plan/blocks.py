"""The sizes of a model that its cost depends on, whether or not this package can run it."""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from shardwright.models.config import ModelConfig
from shardwright.plan import catalogue
from shardwright.plan.quantities import Floats


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A decoder in the notation of `docs/notation.md`.

    gated: 1 where the feed-forward is SwiGLU, else two products · tied: 1 where the embedding is the head · window:
    tokens a token sees, 0 for all before it.
    """

    layers: Floats
    hidden: Floats
    feed_forward: Floats
    heads: Floats
    kv_heads: Floats
    head_size: Floats
    vocabulary: Floats
    gated: Floats
    tied: Floats
    window: Floats

    @property
    def layer_parameters(self) -> Floats:
        """Weights of one layer's products."""
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_size
        return self.hidden * (attention + (2 + self.gated) * self.feed_forward)

    @property
    def end_parameters(self) -> Floats:
        """Weights of embedding and head together."""
        return (2 - self.tied) * self.vocabulary * self.hidden

    @property
    def parameters(self) -> Floats:
        """Weights of the whole model, norms and biases left out."""
        return self.layers * self.layer_parameters + self.end_parameters


@cache
def models() -> dict[str, dict[str, Any]]:
    """The built-in models, by name."""
    return catalogue.read("models")


def built_in(name: str) -> tuple[str, Blocks]:
    """A built-in model's own name and its sizes; an organisation before it or `-fp8` behind it do not count.

    Raises:
        UsageError: there is none of that name; the near ones are listed.
    """
    bare = re.sub(r"(-instruct|-chat|-base|-hf|-fp8|-nvfp4|-bf16)+$", "", name.lower().rsplit("/", 1)[-1])
    key = catalogue.resolve(models(), bare, "model")
    row = {name: value for name, value in models()[key].items() if name != "aliases"}
    return key, Blocks(**({"window": 0} | row))


def of_config(config: ModelConfig) -> Blocks:
    """The sizes of a model this package can run."""
    return Blocks(
        layers=config.layers,
        hidden=config.hidden,
        feed_forward=config.feed_forward,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_size=config.head_size,
        vocabulary=config.vocabulary,
        gated=1,
        tied=int(config.tied),
        window=0,
    )
