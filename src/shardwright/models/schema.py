"""What a config says, checked: the keys all families share, under Hugging Face's names, and rotary scalings.

Decides types, bounds and defaults of what comes from a file, and what of a model follows from it. A family whose
configs say more has a subclass beside its row. Knows no file.
"""

from collections.abc import Mapping
from math import log, sqrt
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from shardwright.models.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
)

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Hugging Face's names of activations → ours; `gelu_new` and `gelu_fast` write the same formula differently."""

Size = Annotated[int, Field(ge=1, le=1 << 24)]
Positive = Annotated[float, Field(gt=0)]
Window = Annotated[int, Field(ge=1)]
Traits = dict[str, Any]
"""Fields of a `ModelConfig`, by name."""


class Checked(BaseModel):
    """Values from a file: of the very types, finite."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


AnyChecked = TypeVar("AnyChecked", bound=Checked)


class Schema(Checked):
    """The keys the decoder depends on; every other one is passed over. Defaults are Llama's in transformers."""

    reads_rotary_share: ClassVar[bool] = False
    rotary_by_default: ClassVar[float] = 1.0
    theta_by_default: ClassVar[float] = 10_000.0

    hidden_size: int = Field(ge=1, le=1 << 20)
    intermediate_size: Size | None
    num_hidden_layers: int = Field(ge=1, le=10_000)
    num_attention_heads: int = Field(ge=1, le=1 << 16)
    num_key_value_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=2, le=1 << 16)
    vocab_size: int = Field(ge=1, le=1 << 28)
    max_position_embeddings: int = Field(default=2048, ge=1)
    original_max_position_embeddings: int | None = Field(default=None, ge=1)
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    sliding_window: Window | None = None
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    partial_rotary_factor: float | None = Field(default=None, ge=0, le=1)
    rotary_dims: int | None = Field(default=None, ge=0, le=1 << 16)
    use_bidirectional_attention: bool | None = None
    add_cross_attention: bool = False

    @property
    def head_size(self) -> int:
        """D."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def feed_forward(self) -> int:
        """F."""
        return self.intermediate_size or 4 * self.hidden_size

    @property
    def ropes(self) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
        """What is said of rotary embedding, and of that of layers with a window where it is another.

        The older `rope_scaling` wins, as in transformers.
        """
        return dict(self.rope_scaling or self.rope_parameters or {}), None

    def traits(self) -> Traits:
        """What of the model follows from this family and config beside sizes, names by `ModelConfig`'s."""
        return {"qkv_bias": self.attention_bias, "out_bias": self.attention_bias, "mlp_bias": self.mlp_bias}

    def differences(self) -> dict[str, bool]:
        """What the config asks for that the decoder would compute differently; True where it does."""
        window = self.use_sliding_window or set(self.layer_types or []) - {"full_attention"}
        return {
            "sliding-window attention": bool(window),
            "bidirectional attention": bool(self.use_bidirectional_attention),
            "cross-attention": self.add_cross_attention,
        }


class WindowedSchema(Schema):
    """Families whose layers may look back over a window, layer by layer as `layer_types` says."""

    def windowed_layers(self) -> list[str]:
        """The type of each layer where `layer_types` is not given."""
        return ["full_attention"] * self.num_hidden_layers

    def windows(self) -> tuple[int, ...]:
        """Tokens each layer looks back over, 0 for all; empty where all look at all."""
        kinds = self.layer_types or self.windowed_layers()
        windows = tuple((self.sliding_window or 0) if kind == "sliding_attention" else 0 for kind in kinds)
        return windows if any(windows) else ()

    def traits(self) -> Traits:
        """Llama's, with the windows."""
        return super().traits() | {"windows": self.windows()}

    def differences(self) -> dict[str, bool]:
        """Other types of layers, too few or too many of them."""
        kinds = self.layer_types or self.windowed_layers()
        known = set(kinds) <= {"full_attention", "sliding_attention"} and len(kinds) == self.num_hidden_layers
        return super().differences() | {"sliding-window attention": False, f"layer_types {kinds!r:.60}": not known}


class Rope(Checked):
    """What every rotary embedding says."""

    rope_type: str
    rope_theta: Positive | None = None
    partial_rotary_factor: float | None = Field(default=None, ge=0, le=1)
    factor: Positive | None = None
    original_max_position_embeddings: int | None = Field(default=None, ge=1)

    def scaling(self, context: int, original: int) -> RopeScaling | None:
        """The stretch it asks for. context: `max_position_embeddings` · original: what was trained on."""
        return None


class LinearRope(Rope):
    """`linear`."""

    factor: Positive

    def scaling(self, context: int, original: int) -> RopeScaling:
        """Needs nothing else."""
        return LinearScaling(factor=self.factor)


class DynamicRope(Rope):
    """`dynamic`."""

    factor: Positive

    def scaling(self, context: int, original: int) -> RopeScaling:
        """Beyond `max_position_embeddings`, as in transformers."""
        return DynamicScaling(factor=self.factor, context=context)


class Llama3Rope(Rope):
    """`llama3`."""

    factor: Positive
    low_freq_factor: float
    high_freq_factor: float

    def scaling(self, context: int, original: int) -> RopeScaling:
        """As said."""
        return Llama3Scaling(
            factor=self.factor, low=self.low_freq_factor, high=self.high_freq_factor, original=original
        )


class YarnRope(Rope):
    """`yarn`."""

    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def scaling(self, context: int, original: int) -> RopeScaling:
        """The magnitude by YaRN's rule, `0.1 ln(factor) + 1`, unless the file has another."""
        factor = self.factor or context / original

        def magnitude(by: float) -> float:
            return 0.1 * by * log(factor) + 1 if factor > 1 else 1.0

        both = self.mscale and self.mscale_all_dim
        ruled = magnitude(self.mscale or 1) / magnitude(self.mscale_all_dim or 1) if both else magnitude(1)
        return YarnScaling(
            factor=factor,
            original=original,
            fast=self.beta_fast or 32.0,
            slow=self.beta_slow or 1.0,
            attention=self.attention_factor or ruled,
            truncate=self.truncate,
        )


class LongRope(Rope):
    """`longrope`, in older files `su`."""

    short_factor: list[Positive]
    long_factor: list[Positive]
    attention_factor: Positive | None = None

    def scaling(self, context: int, original: int) -> RopeScaling:
        """The magnitude by LongRoPE's rule, `sqrt(1 + ln(factor) / ln(original))`, unless the file has another."""
        factor = self.factor or context / original
        ruled = sqrt(1 + log(factor) / log(original)) if factor > 1 else 1.0
        return LongRopeScaling(
            short=tuple(self.short_factor),
            long=tuple(self.long_factor),
            original=original,
            attention=self.attention_factor or ruled,
        )


ROPES: Mapping[str, type[Rope]] = {
    "default": Rope,
    "linear": LinearRope,
    "dynamic": DynamicRope,
    "llama3": Llama3Rope,
    "yarn": YarnRope,
    "longrope": LongRope,
    "su": LongRope,
}
"""Supported rotary types."""
