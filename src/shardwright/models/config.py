"""`ModelConfig`: what the decoder needs to know of a model, whatever file it came from. No torch."""

from dataclasses import dataclass
from math import pi

from shardwright.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's frequency stretch.

    factor: how far slow pairs are stretched · low, high: turns over `original` positions below which a pair is slow,
    above which it is fast.
    """

    factor: float
    low: float
    high: float
    original: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer, in the notation of `docs/notation.md`.

    family: name of the row in `models.families` · hidden H · feed_forward F · layers · heads N · kv_heads K ·
    head_size D · vocabulary V · context: longest sequence, in tokens · tied: the embedding is the head too · qk_norm:
    RMSNorm on each query and key head · *_bias: which projections carry a bias · dtype: of the weights, by name.
    """

    family: str
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("hidden", "feed_forward", "layers", "heads", "kv_heads", "head_size", "vocabulary", "context"):
            size: int = self.__dict__[name]
            if size < 1:
                raise UsageError(name, size, "a model's sizes are at least 1", "check the model's config")
        if self.heads % self.kv_heads:
            raise UsageError(
                "kv_heads", self.kv_heads, f"it must divide the {self.heads} query heads", "check the model's config"
            )
        if self.head_size % 2:
            raise UsageError("head_size", self.head_size, "rotary embedding turns pairs", "check the model's config")

    def rope_frequencies(self) -> tuple[float, ...]:
        """Angle per position of each of the D/2 rotary pairs, `theta^(-2i/D)` (Su et al. 2021), stretched if asked.

        Llama 3.1's stretch keeps pairs that turn often, divides slow ones by `factor` and blends those between, by
        their turns over the original context (the reference code published with Llama 3.1, `apply_scaling`).
        """
        base = tuple(self.rope_theta ** (-2 * pair / self.head_size) for pair in range(self.head_size // 2))
        if self.rope_scaling is None:
            return base
        scaling, stretched = self.rope_scaling, []
        for frequency in base:
            turns = scaling.original * frequency / (2 * pi)
            blend = min(max((turns - scaling.low) / (scaling.high - scaling.low), 0.0), 1.0)
            stretched.append(frequency * (blend + (1 - blend) / scaling.factor))
        return tuple(stretched)
