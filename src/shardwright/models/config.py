"""`ModelConfig`: what the decoder needs to know of a model, whatever file it came from. No torch."""

from dataclasses import dataclass
from typing import Literal

from shardwright.errors import UsageError
from shardwright.models.rope import Frequencies, RopeScaling, plain

Norm = Literal["rms", "rms_once", "rms_plus_one", "layer"]
"""RMSNorm; rounded once, behind its weight; by 1 + weight, rounded once; LayerNorm."""

Block = Literal["pre", "post", "sandwich", "parallel", "parallel_shared"]
"""Where the norms of a layer are: before attention and MLP; behind each; both; before, with attention and MLP side by
side, by two norms or by one they share."""

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer, in the notation of `docs/notation.md`; defaults are Llama's.

    family: name of the row in `models.families` · hidden H · feed_forward F · layers · heads N · kv_heads K ·
    head_size D · vocabulary V · context: longest sequence, in tokens · tied: the embedding is the head too · qk_norm:
    RMSNorm on each query and key head · wide_qk_norm: on all query heads as one vector, and on all key heads ·
    own_qk_norm: LayerNorm on each head, by weights of its own ·
    *_bias: which projections carry a bias · gated: the MLP has a gate beside its up projection · dtype: of the weights,
    by name.

    rotary_size: how many dims of a head are turned, all by default · learned_positions: rows of a table of positions
    that is added to the embedding, from row position_offset on, where nothing is turned · alibi: positions are biases
    of scores, and nothing is turned either · windows: for each layer the
    tokens it looks back over, 0 for all; empty where all layers look at all · local_rope_theta: base of the layers with
    a window, where it is another · score_scale: of attention scores, `D^-0.5` by default · score_cap, logit_cap: soft
    limits by tanh, 0 for none · embedding_scale: what embeddings are multiplied by.
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
    wide_qk_norm: bool = False
    own_qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "float32"
    norm: Norm = "rms"
    block: Block = "pre"
    activation: Activation = "silu"
    gated: bool = True
    rotary_size: int | None = None
    learned_positions: int = 0
    position_offset: int = 0
    alibi: bool = False
    windows: tuple[int, ...] = ()
    local_rope_theta: float | None = None
    score_scale: float | None = None
    score_cap: float = 0.0
    logit_cap: float = 0.0
    embedding_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("hidden", "feed_forward", "layers", "heads", "kv_heads", "head_size", "vocabulary", "context"):
            size: int = self.__dict__[name]
            if size < 1:
                raise UsageError(name, size, "a model's sizes are at least 1", "check the model's config")
        if self.heads % self.kv_heads:
            raise UsageError(
                "kv_heads", self.kv_heads, f"it must divide the {self.heads} query heads", "check the model's config"
            )
        if self.turned > self.head_size or self.turned % 2:
            raise UsageError("head_size", self.head_size, "rotary embedding turns pairs", "check the model's config")
        if len(self.windows) not in (0, self.layers):
            raise UsageError("windows", self.windows, f"there are {self.layers} layers", "give one for each layer")

    @property
    def turned(self) -> int:
        """Dims of a head that rotary embedding turns; none where positions are learned, or biases."""
        if self.learned_positions or self.alibi:
            return 0
        return self.head_size if self.rotary_size is None else self.rotary_size

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_size**-0.5 if self.score_scale is None else self.score_scale

    def window(self, layer: int) -> int:
        """How many tokens a layer looks back over, 0 for all."""
        return self.windows[layer] if self.windows else 0

    def rope_frequencies(self, length: int = 0) -> Frequencies:
        """Angle per position of each rotary pair, stretched if asked, in a sequence of `length` known tokens."""
        if self.rope_scaling is None or not self.turned:
            return plain(self.rope_theta, self.turned)
        return self.rope_scaling.frequencies(self.rope_theta, self.turned, length)
