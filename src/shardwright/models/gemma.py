"""Gemma: norms by 1 + weight, GeGLU, scaled embeddings; since Gemma 2 also norms behind, windows and soft limits."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator

from shardwright.models.family import GGUF, Family, Naming
from shardwright.models.llama_like import HUGGINGFACE, LLAMACPP, STANDARD
from shardwright.models.schema import Positive, Schema, Traits, Window, WindowedSchema

NAMING = Naming(
    names=HUGGINGFACE
    | {
        "layers.{i}.attention_post_norm": "model.layers.{i}.post_attention_layernorm",
        "layers.{i}.mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
        "layers.{i}.mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
    },
    ignored=("model.layers.{i}.self_attn.rotary_emb.inv_freq",),
)

NORMS = ("attention_norm", "attention.q_norm", "attention.k_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
GGUF_NAMING = Naming(
    names=LLAMACPP, transforms=dict.fromkeys(("norm", *(f"layers.{{i}}.{name}" for name in NORMS)), "less_one")
)


class Gemma(Schema):
    """Norms where Llama has them; tied; heads wider than the hidden size has room for."""

    head_dim: int | None = Field(default=256, ge=2, le=1 << 16)
    max_position_embeddings: int = Field(default=8192, ge=1)
    hidden_act: str = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True

    @field_validator("hidden_act")
    @classmethod
    def _legacy(cls, said: str) -> str:
        """The first files say `gelu` and mean its approximation."""
        return "gelu_pytorch_tanh" if said == "gelu" else said

    def traits(self) -> Traits:
        """Biases as Llama's."""
        scale = self.hidden_size**0.5
        return super().traits() | {"mlp_bias": False, "norm": "rms_plus_one", "embedding_scale": scale}


GEMMA = Family(
    name="gemma",
    architecture="GemmaForCausalLM",
    schema=Gemma,
    huggingface=STANDARD,
    gguf=GGUF(architecture="gemma", naming=GGUF_NAMING),
)


class Gemma2(WindowedSchema):
    """Every other layer has the window, from the first on."""

    layers_of_27b: ClassVar[int] = 46

    head_dim: int | None = Field(default=256, ge=2, le=1 << 16)
    max_position_embeddings: int = Field(default=8192, ge=1)
    hidden_act: str = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True
    sliding_window: Window | None = 4096
    query_pre_attn_scalar: Positive | None = 256
    attn_logit_softcapping: Positive | None = 50.0
    final_logit_softcapping: Positive | None = 30.0

    def windowed_layers(self) -> list[str]:
        """In turn."""
        return ["full_attention" if i % 2 else "sliding_attention" for i in range(self.num_hidden_layers)]

    @property
    def score_scale(self) -> float:
        """GGUF files do not say: the models of 27B score by hidden size and heads, all others by head size."""
        largest = self.num_hidden_layers == self.layers_of_27b
        by_size = self.hidden_size // self.num_attention_heads if largest else self.head_size
        return float((self.query_pre_attn_scalar or by_size) ** -0.5)

    def traits(self) -> Traits:
        """What both versions share."""
        return super().traits() | {
            "mlp_bias": False,
            "norm": "rms_plus_one",
            "block": "sandwich",
            "score_scale": self.score_scale,
            "score_cap": self.attn_logit_softcapping or 0.0,
            "logit_cap": self.final_logit_softcapping or 0.0,
            "embedding_scale": self.hidden_size**0.5,
        }


GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    schema=Gemma2,
    keys={"hidden_act": "hidden_activation"},
    huggingface=NAMING,
    gguf=GGUF(
        architecture="gemma2",
        naming=GGUF_NAMING,
        keys={
            "sliding_window": "attention.sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        implied=lambda tensors: {"query_pre_attn_scalar": None},
    ),
)


class Gemma3(Gemma2):
    """All but every sixth layer have the window, and another rotary base; each head is normed."""

    theta_by_default = 1_000_000.0
    layers_of_27b = 62

    max_position_embeddings: int = Field(default=131_072, ge=1)
    attn_logit_softcapping: Positive | None = None
    final_logit_softcapping: Positive | None = None
    rope_local_base_freq: Positive = 10_000.0
    sliding_window_pattern: int = Field(default=6, ge=1)

    def windowed_layers(self) -> list[str]:
        """All but each `sliding_window_pattern`th."""
        whole = range(self.sliding_window_pattern - 1, self.num_hidden_layers, self.sliding_window_pattern)
        return ["full_attention" if i in whole else "sliding_attention" for i in range(self.num_hidden_layers)]

    @property
    def ropes(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The newer form has one for each type of layer; in the older, scaling is that of layers without a window."""
        said = self.rope_parameters or {}
        whole = {**(said.get("full_attention") or {}), **(self.rope_scaling or {})}
        return whole, {"rope_theta": self.rope_local_base_freq, **(said.get("sliding_attention") or {})}

    def traits(self) -> Traits:
        """Gemma 2's, with norms on heads."""
        return super().traits() | {"qk_norm": True}

    def differences(self) -> dict[str, bool]:
        """Capped scores: transformers reads that key, and caps none."""
        return super().differences() | {"attn_logit_softcapping": self.attn_logit_softcapping is not None}


GEMMA3 = Family(
    name="gemma3",
    architecture="Gemma3ForCausalLM",
    schema=Gemma3,
    keys={"hidden_act": "hidden_activation"},
    huggingface=NAMING,
    gguf=GGUF(
        architecture="gemma3",
        naming=GGUF_NAMING,
        keys={
            "sliding_window": "attention.sliding_window",
            "sliding_window_pattern": "attention.sliding_window_pattern",
            "rope_local_base_freq": "rope.freq_base_swa",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        implied=lambda tensors: {"query_pre_attn_scalar": None, "sliding_window": None},
    ),
)
