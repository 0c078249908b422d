"""Families with LayerNorm: StableLM, GPT-NeoX, Falcon, and GPT-2 and OPT, whose positions are learned."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from shardwright.models.family import GGUF, Family, Fused, Naming
from shardwright.models.llama_like import FUSED_LLAMACPP, HUGGINGFACE, LLAMACPP, STANDARD
from shardwright.models.schema import Positive, Schema, Size, Traits

LAYER_NORM_EPS = {"rms_norm_eps": "attention.layer_norm_epsilon"}
"""Where GGUF files keep what config.json calls otherwise."""

IN_ORDER: Mapping[str, Fused] = {"layers.{i}.attention.qkv": "in order"}


class _Divided(Schema):
    """Head sizes follow from the hidden size, whatever else a config says."""

    @property
    def head_size(self) -> int:
        """H / N."""
        return self.hidden_size // self.num_attention_heads


class _MultiHead(_Divided):
    """Each query head has its own KV head."""

    @property
    def kv_heads(self) -> int:
        """N."""
        return self.num_attention_heads


class StableLm(_Divided):
    """Llama with LayerNorm, a quarter of each head turned."""

    reads_rotary_share = True
    rotary_by_default: ClassVar[float] = 0.25

    rms_norm_eps: Positive = 1e-5
    max_position_embeddings: int = Field(default=4096, ge=1)
    use_qkv_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_residual: bool = False

    def traits(self) -> Traits:
        """Side by side, attention and MLP share a norm."""
        block = "parallel_shared" if self.use_parallel_residual else "pre"
        return {
            "qkv_bias": self.use_qkv_bias,
            "norm": "layer",
            "block": block,
            "own_qk_norm": self.qk_layernorm,
        }


STABLELM = Family(
    name="stablelm",
    architecture="StableLmForCausalLM",
    schema=StableLm,
    keys={"rms_norm_eps": "layer_norm_eps"},
    huggingface=replace(
        STANDARD,
        names=HUGGINGFACE
        | {
            f"layers.{{i}}.attention.qk_norm.{part}": f"model.layers.{{i}}.self_attn.{part}_layernorm.norms.{{head}}"
            for part in "qk"
        },
    ),
    gguf=GGUF(
        architecture="stablelm",
        naming=Naming(
            names=LLAMACPP, transforms={f"layers.{{i}}.attention.qk_norm.{part}": "flatten" for part in "qk"}
        ),
        keys=LAYER_NORM_EPS,
        implied=lambda tensors: {
            "use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors,
            "use_qkv_bias": "blk.0.attn_q.bias" in tensors,
            "qk_layernorm": "blk.0.attn_q_norm.weight" in tensors,
        },
    ),
)


class GPTNeoX(_MultiHead):
    """A plain MLP beside attention, biases everywhere, a quarter of each head turned."""

    reads_rotary_share = True
    rotary_by_default: ClassVar[float] = 0.25

    rms_norm_eps: Positive = 1e-5
    hidden_act: str = "gelu"
    attention_bias: bool = True
    use_parallel_residual: bool = True

    def traits(self) -> Traits:
        """Each of attention and MLP has its norm, in either order."""
        return {
            "qkv_bias": self.attention_bias,
            "out_bias": self.attention_bias,
            "mlp_bias": True,
            "gated": False,
            "norm": "layer",
            "block": "parallel" if self.use_parallel_residual else "pre",
        }


GPT_NEOX = Family(
    name="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    schema=GPTNeoX,
    keys={"rms_norm_eps": "layer_norm_eps", "partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"},
    huggingface=Naming(
        names={
            "embedding": "gpt_neox.embed_in",
            "layers.{i}.attention_norm": "gpt_neox.layers.{i}.input_layernorm",
            "layers.{i}.attention.qkv.q": "gpt_neox.layers.{i}.attention.query_key_value",
            "layers.{i}.attention.qkv.k": "gpt_neox.layers.{i}.attention.query_key_value",
            "layers.{i}.attention.qkv.v": "gpt_neox.layers.{i}.attention.query_key_value",
            "layers.{i}.attention.out": "gpt_neox.layers.{i}.attention.dense",
            "layers.{i}.mlp_norm": "gpt_neox.layers.{i}.post_attention_layernorm",
            "layers.{i}.mlp.up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
            "layers.{i}.mlp.down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
            "norm": "gpt_neox.final_layer_norm",
            "head": "embed_out",
        },
        fused={"layers.{i}.attention.qkv": "by KV head"},
        ignored=tuple(
            f"gpt_neox.layers.{{i}}.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
        ),
    ),
    gguf=GGUF(
        architecture="gptneox",
        naming=Naming(names=FUSED_LLAMACPP, fused=IN_ORDER),
        keys=LAYER_NORM_EPS | {"use_parallel_residual": "use_parallel_residual"},
        implied=lambda tensors: {"attention_bias": "blk.0.attn_qkv.bias" in tensors},
    ),
)


class Falcon(_Divided):
    """A plain MLP beside attention: behind one norm in 7B, behind two in 40B and 180B, which also group their heads."""

    rms_norm_eps: Positive = 1e-5
    intermediate_size: Size | None = None
    hidden_act: str = "gelu"
    tie_word_embeddings: bool = True
    alibi: bool = False
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False
    num_ln_in_parallel_attn: int | None = Field(default=None, ge=1, le=2)

    @property
    def kv_heads(self) -> int:
        """One, in models before the new decoder with multi-query attention."""
        return 1 if self.multi_query and not self.new_decoder_architecture else super().kv_heads

    def traits(self) -> Traits:
        """Two norms only in the new decoder."""
        two = self.new_decoder_architecture and self.num_ln_in_parallel_attn != 1
        side_by_side = self.new_decoder_architecture or self.parallel_attn
        return {
            "qkv_bias": self.bias,
            "out_bias": self.bias,
            "mlp_bias": self.bias,
            "gated": False,
            "norm": "layer",
            "block": "parallel" if two else "parallel_shared" if side_by_side else "pre",
            "alibi": self.alibi,
        }

    def differences(self) -> dict[str, bool]:
        """Two norms where the new decoder is not."""
        two = not self.new_decoder_architecture and self.num_ln_in_parallel_attn == 2
        sequential = self.new_decoder_architecture and not self.parallel_attn
        return super().differences() | {
            "num_ln_in_parallel_attn 2 without new_decoder_architecture": two and self.parallel_attn,
            "new_decoder_architecture without parallel_attn": sequential,
        }


FALCON = Family(
    name="falcon",
    architecture="FalconForCausalLM",
    schema=Falcon,
    keys={
        "rms_norm_eps": "layer_norm_epsilon",
        "num_key_value_heads": "num_kv_heads",
        "intermediate_size": "ffn_hidden_size",
        "hidden_act": "activation",
    },
    huggingface=Naming(
        names={
            "embedding": "transformer.word_embeddings",
            "layers.{i}.attention_norm": "transformer.h.{i}.input_layernorm",
            "layers.{i}.attention.qkv.q": "transformer.h.{i}.self_attention.query_key_value",
            "layers.{i}.attention.qkv.k": "transformer.h.{i}.self_attention.query_key_value",
            "layers.{i}.attention.qkv.v": "transformer.h.{i}.self_attention.query_key_value",
            "layers.{i}.attention.out": "transformer.h.{i}.self_attention.dense",
            "layers.{i}.mlp_norm": "transformer.h.{i}.post_attention_layernorm",
            "layers.{i}.mlp.up": "transformer.h.{i}.mlp.dense_h_to_4h",
            "layers.{i}.mlp.down": "transformer.h.{i}.mlp.dense_4h_to_h",
            "norm": "transformer.ln_f",
            "head": "lm_head",
        },
        fused={"layers.{i}.attention.qkv": "by KV head"},
        by_block={
            "parallel": {
                "layers.{i}.attention_norm": "transformer.h.{i}.ln_attn",
                "layers.{i}.mlp_norm": "transformer.h.{i}.ln_mlp",
            }
        },
    ),
    gguf=GGUF(
        architecture="falcon",
        naming=Naming(
            names=FUSED_LLAMACPP,
            fused=IN_ORDER,
            by_block={
                "parallel": {
                    "layers.{i}.attention_norm": "blk.{i}.attn_norm_2",
                    "layers.{i}.mlp_norm": "blk.{i}.attn_norm",
                }
            },
        ),
        keys=LAYER_NORM_EPS,
        implied=lambda tensors: {
            "new_decoder_architecture": True,  # as the file lays out q, k and v, there is no other
            "num_ln_in_parallel_attn": 2 if "blk.0.attn_norm_2.weight" in tensors else 1,
            "bias": "blk.0.attn_qkv.bias" in tensors,
        },
    ),
)


class GPT2Schema(_MultiHead):
    """A plain MLP behind attention, biases everywhere, a table of positions."""

    rms_norm_eps: Positive = 1e-5
    intermediate_size: Size | None = None
    max_position_embeddings: int = Field(default=1024, ge=1)
    hidden_act: str = "gelu_new"
    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False

    def traits(self) -> Traits:
        """As many rows of positions as there is context."""
        return LEARNED | {
            "learned_positions": self.max_position_embeddings,
            "score_scale": None if self.scale_attn_weights else 1.0,
        }

    def differences(self) -> dict[str, bool]:
        """A scale of scores that falls from layer to layer."""
        return super().differences() | {"scale_attn_by_inverse_layer_idx": self.scale_attn_by_inverse_layer_idx}


LEARNED: Traits = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "gated": False, "norm": "layer"}

_CONV1D = ("attention.qkv.q", "attention.qkv.k", "attention.qkv.v", "attention.out", "mlp.up", "mlp.down")

GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    schema=GPT2Schema,
    keys={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    },
    huggingface=Naming(
        names={
            "embedding": "transformer.wte",
            "positions": "transformer.wpe",
            "layers.{i}.attention_norm": "transformer.h.{i}.ln_1",
            "layers.{i}.attention.qkv.q": "transformer.h.{i}.attn.c_attn",
            "layers.{i}.attention.qkv.k": "transformer.h.{i}.attn.c_attn",
            "layers.{i}.attention.qkv.v": "transformer.h.{i}.attn.c_attn",
            "layers.{i}.attention.out": "transformer.h.{i}.attn.c_proj",
            "layers.{i}.mlp_norm": "transformer.h.{i}.ln_2",
            "layers.{i}.mlp.up": "transformer.h.{i}.mlp.c_fc",
            "layers.{i}.mlp.down": "transformer.h.{i}.mlp.c_proj",
            "norm": "transformer.ln_f",
            "head": "lm_head",
        },
        transforms={f"layers.{{i}}.{name}": "transpose" for name in _CONV1D},
        fused=IN_ORDER,
        ignored=("transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias"),
        prefix="transformer.",
    ),
    gguf=GGUF(architecture="gpt2", naming=Naming(names=FUSED_LLAMACPP, fused=IN_ORDER), keys=LAYER_NORM_EPS),
)


class OPTSchema(_MultiHead):
    """As GPT-2, with ReLU and two rows of positions before the first."""

    rms_norm_eps: Positive = 1e-5
    hidden_act: str = "relu"
    tie_word_embeddings: bool = True
    do_layer_norm_before: bool = True
    word_embed_proj_dim: Size | None = None
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True

    def traits(self) -> Traits:
        """Rows for the context and those two."""
        biases = {"qkv_bias": self.enable_bias, "out_bias": self.enable_bias, "mlp_bias": self.enable_bias}
        return LEARNED | biases | {"learned_positions": self.max_position_embeddings + 2, "position_offset": 2}

    def differences(self) -> dict[str, bool]:
        """What opt-350m alone has: norms behind, and embeddings narrower than the model."""
        return super().differences() | {
            "do_layer_norm_before false": not self.do_layer_norm_before,
            "word_embed_proj_dim": self.word_embed_proj_dim not in (None, self.hidden_size),
            "layer_norm_elementwise_affine false": not self.layer_norm_elementwise_affine,
        }


OPT = Family(
    name="opt",
    architecture="OPTForCausalLM",
    schema=OPTSchema,
    keys={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
    huggingface=Naming(
        names={
            ours: theirs.replace("model.", "model.decoder.").replace("self_attn.o_proj", "self_attn.out_proj")
            for ours, theirs in HUGGINGFACE.items()
        }
        | {
            "positions": "model.decoder.embed_positions",
            "layers.{i}.attention_norm": "model.decoder.layers.{i}.self_attn_layer_norm",
            "layers.{i}.mlp_norm": "model.decoder.layers.{i}.final_layer_norm",
            "layers.{i}.mlp.up": "model.decoder.layers.{i}.fc1",
            "layers.{i}.mlp.down": "model.decoder.layers.{i}.fc2",
            "norm": "model.decoder.final_layer_norm",
        },
        prefix="model.",
    ),
)
