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
