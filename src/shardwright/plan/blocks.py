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
    tokens a token sees, 0 for all before it · qk_norm and *_bias: 1 where a layer has those small parameters.
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
    qk_norm: Floats = 0
    qkv_bias: Floats = 0
    out_bias: Floats = 0
    mlp_bias: Floats = 0


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
        qk_norm=int(config.qk_norm),
        qkv_bias=int(config.qkv_bias),
        out_bias=int(config.out_bias),
        mlp_bias=int(config.mlp_bias),
    )
