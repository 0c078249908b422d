"""Tiny models, and their parameters put together again: what tests of anything sharded compare with."""

from collections.abc import Mapping, Sequence
from math import inf, isnan

import torch
from torch import Tensor

from shardwright.comm import regions
from shardwright.layers.batch import Batch
from shardwright.layers.layer import cut, narrowed
from shardwright.layout.spec import Specs, boxes
from shardwright.models.config import ModelConfig
from shardwright.models.decoder import Decoder

_GEMMA: dict[str, object] = {
    "norm": "rms_plus_one",
    "block": "sandwich",
    "activation": "gelu_tanh",
    "windows": (3, 0),
    "score_scale": 0.3,
    "embedding_scale": 4.5,
    "tied": True,
}
_BIASES: dict[str, object] = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}

SHAPES: Mapping[str, Mapping[str, object]] = {
    "llama": {},
    "mistral": {"family": "mistral", "windows": (3, 0)},
    "qwen2": {"family": "qwen2", "qkv_bias": True},
    "qwen3": {"family": "qwen3", "qk_norm": True},
    "phi3": {"family": "phi3"},
    "olmo2": {"family": "olmo2", "block": "post", "norm": "rms_once", "wide_qk_norm": True},
    "gemma": {
        "family": "gemma",
        "norm": "rms_plus_one",
        "activation": "gelu_tanh",
        "embedding_scale": 4.5,
        "tied": True,
    },
    "gemma2": {"family": "gemma2", "score_cap": 5.0, "logit_cap": 3.0, **_GEMMA},
    "gemma3": {"family": "gemma3", "qk_norm": True, "local_rope_theta": 100.0, **_GEMMA},
    "stablelm": {"family": "stablelm", "norm": "layer", "rotary_size": 2},
    "stablelm, a norm for each head": {
        "family": "stablelm",
        "norm": "layer",
        "block": "parallel_shared",
        "own_qk_norm": True,
    },
    "gpt_neox": {
        "family": "gpt_neox",
        "norm": "layer",
        "block": "parallel",
        "gated": False,
        "rotary_size": 2,
        **_BIASES,
    },
    "falcon": {"family": "falcon", "norm": "layer", "block": "parallel_shared", "gated": False, "activation": "gelu"},
    "falcon, ALiBi": {"family": "falcon", "norm": "layer", "gated": False, "alibi": True},
    "falcon, two norms": {"family": "falcon", "norm": "layer", "block": "parallel", "gated": False, "tied": True},
    "gpt2": {"family": "gpt2", "norm": "layer", "gated": False, "learned_positions": 64, "tied": True, **_BIASES},
    "opt": {
        "family": "opt",
        "norm": "layer",
        "gated": False,
        "activation": "relu",
        "learned_positions": 66,
        "position_offset": 2,
    },
}
"""For each family, and each kind of layer in it, what of `tiny_config` makes it."""


def tiny_config(**changes: object) -> ModelConfig:
    """A two-layer Llama whose sizes divide nothing: 6 query heads over 2 KV heads, H 20, F 11, V 23."""
    sizes: dict[str, object] = {
        "family": "llama",
        "hidden": 20,
        "feed_forward": 11,
        "layers": 2,
        "heads": 6,
        "kv_heads": 2,
        "head_size": 4,
        "vocabulary": 23,
        "context": 64,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
    }
    return ModelConfig(**(sizes | changes))  # type: ignore[arg-type]


def loss_of(model: Decoder, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Mean next-token cross-entropy of whole sequences, from gathered logits: slow, and plainly right."""
    batch = Batch.whole(sequences)
    logits = regions.gather(model(batch), 1, model.cuts.vocabulary.widths, model.group, "logits")
    last = torch.tensor([stop - 1 for _, stop in batch.ranges])
    keep = torch.ones(len(batch.tokens), dtype=torch.bool).index_fill(0, last, False)
    return torch.nn.functional.cross_entropy(logits[keep], batch.tokens.roll(-1)[keep])


def whole_tensors(tensors: Mapping[str, Tensor], specs: Specs) -> dict[str, Tensor]:
    """One unsharded model's parameters (or gradients) under their checkpoint names. `specs` are those of size 1."""
    out: dict[str, Tensor] = {}
    for name, spec in specs.items():
        for piece in spec.pieces:
            full = out.setdefault(piece.source, tensors[name].new_full(piece.source_shape, float("nan")))
            local = narrowed(tensors[name], piece.local_ranges)
            local = local.T if piece.transform == "transpose" else local
            for there, here in boxes(piece.source_ranges):
                narrowed(full, there).copy_(narrowed(local, here))
    return out


def largest_difference(tensors: Mapping[str, Tensor], specs: Specs, whole: Mapping[str, Tensor]) -> float:
    """The largest difference, relative to the largest value of the whole tensor, of any piece; infinite for a NaN."""
    worst = 0.0
    for name, spec in specs.items():
        for piece in spec.pieces:
            difference = narrowed(tensors[name], piece.local_ranges) - cut(whole[piece.source], piece)
            scale = whole[piece.source].abs().max().clamp_min(1e-30)
            relative = (difference.abs().max() / scale).item() if difference.numel() else 0.0
            worst = inf if isnan(relative) else max(worst, relative)  # `max` passes over a NaN
    return worst
