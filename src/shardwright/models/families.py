"""The supported model families, as data: how each names its tensors, and the little in which they differ.

A family is a row of `FAMILIES`. What a config file says is read in `models.read`; how a model computes is the one
decoder in `models.decoder`; this file only names things.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from shardwright.errors import UnsupportedError
from shardwright.layout.spec import Transform


@dataclass(frozen=True, kw_only=True)
class Naming:
    """From the decoder's own source names, less `.weight` or `.bias`, to a checkpoint's; `{i}` is the layer.

    transforms: what turns a checkpoint's tensor into ours, for the sources that need it · ignored: names a file may
    hold that nothing reads.
    """

    names: Mapping[str, str]
    transforms: Mapping[str, Transform]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: its name, and how files call it and its tensors."""

    name: str
    architecture: str
    gguf_architecture: str
    qk_norm: bool
    huggingface: Naming
    gguf: Naming


_HUGGINGFACE = {
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

_GGUF = {
    "embedding": "token_embd",
    "layers.{i}.attention_norm": "blk.{i}.attn_norm",
    "layers.{i}.attention.qkv.q": "blk.{i}.attn_q",
    "layers.{i}.attention.qkv.k": "blk.{i}.attn_k",
    "layers.{i}.attention.qkv.v": "blk.{i}.attn_v",
    "layers.{i}.attention.q_norm": "blk.{i}.attn_q_norm",
    "layers.{i}.attention.k_norm": "blk.{i}.attn_k_norm",
    "layers.{i}.attention.out": "blk.{i}.attn_output",
    "layers.{i}.mlp_norm": "blk.{i}.ffn_norm",
    "layers.{i}.mlp.gate_up.0": "blk.{i}.ffn_gate",
    "layers.{i}.mlp.gate_up.1": "blk.{i}.ffn_up",
    "layers.{i}.mlp.down": "blk.{i}.ffn_down",
    "norm": "output_norm",
    "head": "output",
}

_HF_NAMING = Naming(names=_HUGGINGFACE, transforms={}, ignored=("model.layers.{i}.self_attn.rotary_emb.inv_freq",))

FAMILIES: tuple[Family, ...] = (
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        gguf_architecture="llama",
        qk_norm=False,
        huggingface=_HF_NAMING,
        gguf=Naming(
            names=_GGUF,
            transforms={
                "layers.{i}.attention.qkv.q": "rope_unpermute",
                "layers.{i}.attention.qkv.k": "rope_unpermute",
            },
        ),
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        gguf_architecture="qwen3",
        qk_norm=True,
        huggingface=_HF_NAMING,
        gguf=Naming(names=_GGUF, transforms={}),
    ),
)


def by_architecture(architecture: object) -> Family:
    """The family of a Hugging Face `architectures` entry, or `UnsupportedError` listing those there are."""
    return _find(architecture, {family.architecture: family for family in FAMILIES})


def by_gguf_architecture(architecture: object) -> Family:
    """The family of a GGUF's `general.architecture`, or `UnsupportedError` listing those there are."""
    return _find(architecture, {family.gguf_architecture: family for family in FAMILIES})


def by_name(name: str) -> Family:
    """The family of that name."""
    return _find(name, {family.name: family for family in FAMILIES})


def _find(name: object, known: dict[str, Family]) -> Family:
    if not isinstance(name, str) or name not in known:
        raise UnsupportedError(f"architecture {name!r:.80} is not supported; supported are {', '.join(sorted(known))}")
    return known[name]
