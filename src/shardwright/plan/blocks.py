"""The sizes of a model that its cost depends on, whether or not this package can run it."""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from shardwright.plan import catalogue
from shardwright.plan.quantities import Floats


@dataclass(frozen=True, kw_only=True)
class Holds:
    """How many parameters a rank holds of a layer: `whole` of them whatever its share, and so many for each of its
    query heads, KV heads and feed-forward features. ends: whole on every rank beside the tables of the vocabulary.
    """

    whole: Floats
    per_head: Floats
    per_kv_head: Floats
    per_feature: Floats
    ends: Floats


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A decoder in the notation of `docs/notation.md`.

    gated: 1 where the feed-forward has a gate beside its up projection · tied: 1 where the embedding is the head ·
    window: tokens a token sees in the layers that have a window, 0 for none; windowed: their share of the layers ·
    parts: blocks of the residual stream in a layer · norms: of H features, a layer; behind: those of them behind a
    block · head_norms: 1 where heads of q and k are normed · turned: share of a head's dims that rotary embedding turns
    · sums, sums_back: all-reduces of T x H of a layer, forward and backward · norm_sums: those of T x 2, either way ·
    context: the longest sequence it is for, on which no cost depends; 0 where nobody says.

    What single operations keep for the backward: norm_kept: numbers for each one of a norm's output · head_kept: of
    norms on heads, the same · activation_kept: 0 where its input or output is enough · scores_kept: for each score of
    attention, 0 where it is fused whole, 1 where a bias by head is.
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
    windowed: Floats = 1
    parts: Floats = 2
    norms: Floats = 2
    behind: Floats = 0
    norm_kept: Floats = 1
    head_kept: Floats = 1
    activation_kept: Floats = 1
    scores_kept: Floats = 0
    head_norms: Floats = 0
    turned: Floats = 1
    sums: Floats = 2
    sums_back: Floats = 2
    norm_sums: Floats = 0
    context: Floats = 0
    holds: Holds


def of_sizes(
    *,
    layers: float,
    hidden: float,
    feed_forward: float,
    heads: float,
    kv_heads: float,
    head_size: float,
    vocabulary: float,
    gated: float,
    tied: float,
    window: float = 0,
) -> Blocks:
    """A model of which no more is known than its sizes: two RMSNorms a layer, no biases, rotary where it is gated."""
    per_head = 2 * hidden * head_size
    return Blocks(
        layers=layers,
        hidden=hidden,
        feed_forward=feed_forward,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocabulary=vocabulary,
        gated=gated,
        tied=tied,
        window=window,
        turned=gated,
        holds=Holds(
            whole=2 * hidden,
            per_head=per_head,
            per_kv_head=per_head,
            per_feature=(2 + gated) * hidden,
            ends=hidden,
        ),
    )


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
    return key, of_sizes(**row)
