"""Families that are Llama but for little: norms before attention and gated MLP, rotary positions."""

from pydantic import Field

from shardwright.models.family import GGUF, Family, Naming
from shardwright.models.schema import Positive, Schema, Traits, Window, WindowedSchema

HUGGINGFACE = {
    "embedding": "model.embed_tokens",
    "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.attention.qkv.q": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.qkv.k": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.qkv.v": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_norm",
    "layers.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_norm",
    "layers.{i}.attention.out": "model.layers.{i}.self_attn.o_proj",
    "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp.gate_up.0": "model.layers.{i}.mlp.gate_proj",
    "layers.{i}.mlp.gate_up.1": "model.layers.{i}.mlp.up_proj",
    "layers.{i}.mlp.down": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}

LLAMACPP = {
    "embedding": "token_embd",
    "positions": "position_embd",
    "layers.{i}.attention_norm": "blk.{i}.attn_norm",
    "layers.{i}.attention.qkv.q": "blk.{i}.attn_q",
    "layers.{i}.attention.qkv.k": "blk.{i}.attn_k",
    "layers.{i}.attention.qkv.v": "blk.{i}.attn_v",
    "layers.{i}.attention.q_norm": "blk.{i}.attn_q_norm",
    "layers.{i}.attention.k_norm": "blk.{i}.attn_k_norm",
    "layers.{i}.attention.qk_norm.q": "blk.{i}.attn_q_norm",
    "layers.{i}.attention.qk_norm.k": "blk.{i}.attn_k_norm",
    "layers.{i}.attention.out": "blk.{i}.attn_output",
    "layers.{i}.attention_post_norm": "blk.{i}.post_attention_norm",
    "layers.{i}.mlp_norm": "blk.{i}.ffn_norm",
    "layers.{i}.mlp.up": "blk.{i}.ffn_up",
    "layers.{i}.mlp.gate_up.0": "blk.{i}.ffn_gate",
    "layers.{i}.mlp.gate_up.1": "blk.{i}.ffn_up",
    "layers.{i}.mlp.down": "blk.{i}.ffn_down",
    "layers.{i}.mlp_post_norm": "blk.{i}.post_ffw_norm",
    "norm": "output_norm",
    "head": "output",
}
"""As GGUF files have them, whatever the family."""

FUSED_LLAMACPP = LLAMACPP | {f"layers.{{i}}.attention.qkv.{part}": "blk.{i}.attn_qkv" for part in "qkv"}
"""The same where q, k and v are one tensor."""

STANDARD = Naming(names=HUGGINGFACE, ignored=("model.layers.{i}.self_attn.rotary_emb.inv_freq",))

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    huggingface=STANDARD,
    gguf=GGUF(
        architecture="llama",
        naming=Naming(
            names=LLAMACPP,
            transforms={"layers.{i}.attention.qkv.q": "rope_unpermute", "layers.{i}.attention.qkv.k": "rope_unpermute"},
            ignored=("rope_freqs.weight",),  # read with the config
        ),
    ),
)


class _AllWindowed(WindowedSchema):
    """Every layer has the window, if there is one; transformers reads no `layer_types`."""

    def windowed_layers(self) -> list[str]:
        """All alike."""
        return ["sliding_attention"] * self.num_hidden_layers

    def differences(self) -> dict[str, bool]:
        """Layers of other types."""
        other = bool(self.layer_types) and self.layer_types != self.windowed_layers()
        return super().differences() | {"alternating layer_types": other}


class Mistral(_AllWindowed):
    """Grouped heads and a window by default."""

    num_key_value_heads: int | None = Field(default=8, ge=1)
    max_position_embeddings: int = Field(default=131_072, ge=1)
    sliding_window: Window | None = 4096

    def traits(self) -> Traits:
        """No bias whatever the config says: transformers reads no such key."""
        return super().traits() | {"qkv_bias": False, "out_bias": False, "mlp_bias": False}


MISTRAL = Family(name="mistral", architecture="MistralForCausalLM", schema=Mistral, huggingface=STANDARD)
"""GGUF files call it llama, and say of no window."""


class Qwen2(WindowedSchema):
    """A bias on q, k and v; a window from some layer on, where it is wanted."""

    max_position_embeddings: int = Field(default=32_768, ge=1)
    sliding_window: Window | None = 4096
    max_window_layers: int = 28

    def windowed_layers(self) -> list[str]:
        """Those above `max_window_layers`."""
        first = self.max_window_layers if self.use_sliding_window else self.num_hidden_layers
        return ["sliding_attention" if i >= first else "full_attention" for i in range(self.num_hidden_layers)]

    def windows(self) -> tuple[int, ...]:
        """None unless `use_sliding_window`, whatever `layer_types` says."""
        return super().windows() if self.use_sliding_window else ()

    def traits(self) -> Traits:
        """No key says that there are biases."""
        return super().traits() | {"qkv_bias": True, "out_bias": False, "mlp_bias": False}


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    schema=Qwen2,
    huggingface=STANDARD,
    gguf=GGUF(architecture="qwen2", naming=Naming(names=LLAMACPP)),
)
"""Qwen1.5, Qwen2 and Qwen2.5 call themselves so."""


class Qwen3(Qwen2):
    """Norms on each head in place of the biases."""

    head_dim: int | None = 128

    def traits(self) -> Traits:
        """Biases only where `attention_bias` says so."""
        biases = {"qkv_bias": self.attention_bias, "out_bias": self.attention_bias}
        return super().traits() | biases | {"qk_norm": True}


QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    schema=Qwen3,
    huggingface=STANDARD,
    gguf=GGUF(architecture="qwen3", naming=Naming(names=LLAMACPP)),
)


class Phi3(_AllWindowed):
    """What was trained on has its own key."""

    reads_rotary_share = True

    rms_norm_eps: Positive = 1e-5
    max_position_embeddings: int = Field(default=4096, ge=1)
    original_max_position_embeddings: int | None = Field(default=4096, ge=1)

    def traits(self) -> Traits:
        """No biases."""
        return super().traits() | {"qkv_bias": False, "out_bias": False, "mlp_bias": False}


PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    schema=Phi3,
    huggingface=Naming(
        names=HUGGINGFACE
        | {f"layers.{{i}}.attention.qkv.{part}": "model.layers.{i}.self_attn.qkv_proj" for part in "qkv"}
        | {f"layers.{{i}}.mlp.gate_up.{part}": "model.layers.{i}.mlp.gate_up_proj" for part in "01"},
        fused={"layers.{i}.attention.qkv": "in order", "layers.{i}.mlp.gate_up": "in order"},
    ),
    gguf=GGUF(
        architecture="phi3",
        naming=Naming(
            names=FUSED_LLAMACPP | {f"layers.{{i}}.mlp.gate_up.{part}": "blk.{i}.ffn_up" for part in "01"},
            fused={"layers.{i}.attention.qkv": "in order", "layers.{i}.mlp.gate_up": "in order"},
            ignored=("rope_factors_long.weight", "rope_factors_short.weight"),  # read with the config
        ),
        keys={"sliding_window": "attention.sliding_window"},
    ),
)


class Olmo2(Schema):
    """Norms behind attention and MLP, and on all heads at once."""

    rms_norm_eps: Positive = 1e-5

    def traits(self) -> Traits:
        """Biases as Llama's."""
        return super().traits() | {
            "mlp_bias": False,
            "block": "post",
            "norm": "rms_once",
            "wide_qk_norm": True,
        }


OLMO2 = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    schema=Olmo2,
    huggingface=Naming(
        names=HUGGINGFACE
        | {
            "layers.{i}.attention.qk_norm.q": "model.layers.{i}.self_attn.q_norm",
            "layers.{i}.attention.qk_norm.k": "model.layers.{i}.self_attn.k_norm",
            "layers.{i}.attention_post_norm": "model.layers.{i}.post_attention_layernorm",
            "layers.{i}.mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
        }
    ),
    gguf=GGUF(architecture="olmo2", naming=Naming(names=LLAMACPP)),
)
