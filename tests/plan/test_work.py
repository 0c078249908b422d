"""The closed forms are exactly what the real layers do: operations, collectives, parameters, rank by rank.

The oracle is the decoder itself on meta tensors: torch's FLOP counter sees every product and attention, the recording
group every collective. Nothing is rounded, so everything is equal, not close.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shardwright.comm.planned import PlannedGroup
from shardwright.comm.recording import RecordingGroup
from shardwright.layers.batch import Batch
from shardwright.layout.heads import HeadPartition
from shardwright.models.decoder import Decoder
from shardwright.models.families import by_name
from shardwright.models.specs import Cuts, model_specs
from shardwright.plan import work
from shardwright.plan.blocks import of_config
from shardwright.plan.memory import stage_parameters
from shardwright.testing.models import tiny_config

VARIANTS: list[dict[str, Any]] = [
    {},
    {"tied": True},
    {"family": "qwen3", "qk_norm": True},
    {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    {"heads": 8, "kv_heads": 8, "head_size": 16, "hidden": 128, "feed_forward": 300, "vocabulary": 1000},
]
LENGTH = 24


def shares(config: Any, tp: int) -> Iterator[tuple[int, work.Share]]:
    """Each rank's share, from the same cuts as the model's."""
    cuts = Cuts.balanced(config, tp)
    for rank in range(tp):
        yield (
            rank,
            work.Share(
                hidden=config.hidden,
                heads=cuts.heads.query.widths[rank],
                kv_heads=cuts.heads.kv_width(rank),
                head_size=config.head_size,
                feed_forward=cuts.feed_forward.widths[rank],
                vocabulary=cuts.vocabulary.widths[rank],
                gated=1,
            ),
        )


def step(config: Any, rank: int, tp: int, *, backward: bool) -> tuple[int, list[tuple[str, int]]]:
    """Operations and (op, bytes) of the collectives of one forward, and backward, on meta tensors."""
    with torch.device("meta"):
        group = RecordingGroup(PlannedGroup(rank, tp))
        model = Decoder(config, group)
        batch = Batch.whole([[1] * LENGTH], device="meta")
        with FlopCounterMode(display=False) as counter:
            logits = model(batch)
            if backward:
                logits.sum().backward()
    return counter.get_total_flops(), [(call.op, call.bytes) for call in group.calls]


@pytest.mark.parametrize("tp", [1, 2, 3, 5])
@pytest.mark.parametrize("changes", VARIANTS)
def test_operations(tp: int, changes: dict[str, Any]) -> None:
    """Forward: the layer's four products, attention with nothing skipped, the logits. Backward: twice all of them."""
    config = tiny_config(**changes)
    for rank, share in shares(config, tp):
        forward, _ = step(config, rank, tp, backward=False)
        both, _ = step(config, rank, tp, backward=True)
        products = sum(work.operations(p) for p in work.products(share, LENGTH))
        attention = work.attention_operations(LENGTH, LENGTH, share.heads, share.head_size)
        head = work.operations(work.head_product(share, LENGTH))
        assert forward == config.layers * (products + attention) + head
        gradients = sum(work.operations(g) for p in work.products(share, LENGTH) for g in work.backward(p))
        of_head = sum(work.operations(g) for g in work.backward(work.head_product(share, LENGTH)))
        assert both - forward == config.layers * (gradients + 2 * attention) + of_head


@pytest.mark.parametrize("tp", [2, 3, 5])
@pytest.mark.parametrize("changes", VARIANTS)
def test_collectives(tp: int, changes: dict[str, Any]) -> None:
    """Forward: an all-reduce of T x H for the embedding and two a layer. Backward: two a layer, one for the logits."""
    config = tiny_config(**changes)
    nbytes = work.activation_bytes(next(shares(config, tp))[1], LENGTH) * 2  # float32 here, bf16 there
    for rank in range(tp):
        _, forward = step(config, rank, tp, backward=False)
        assert forward == [("all_reduce", nbytes)] * (1 + 2 * config.layers)
        _, both = step(config, rank, tp, backward=True)
        assert both[len(forward) :] == [("all_reduce", nbytes)] * (1 + 2 * config.layers)


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("changes", VARIANTS)
def test_parameters(tp: int, changes: dict[str, Any]) -> None:
    """Every rank's bytes by the table that loading reads, which is what `generate --json` reports."""
    config = tiny_config(**changes)
    blocks = of_config(config)
    for rank, share in shares(config, tp):
        table = model_specs(config, Cuts.balanced(config, tp), rank, by_name(config.family).huggingface)
        expected = sum(spec.nbytes for spec in table.values()) // 4
        assert stage_parameters(blocks, share, 1, 0)[0] == expected


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (9, 3), (40, 8), (64, 8), (12, 2), (56, 8)])
def test_the_busiest_and_the_idlest_rank(heads: int, kv_heads: int) -> None:
    """Each dimension of the busiest share is some rank's, and none holds more; of the idlest, none holds less."""
    config = tiny_config(heads=heads, kv_heads=kv_heads, head_size=8, feed_forward=101, vocabulary=203)
    blocks = of_config(config)
    for tp in range(1, heads + 1):
        cut = HeadPartition.balanced(heads, kv_heads, tp)
        most, least = work.busiest(blocks, tp), work.idlest(blocks, tp)
        assert most.heads == max(cut.query.widths)
        assert least.heads == min(cut.query.widths)
        widths = [cut.kv_width(rank) for rank in range(tp)]
        assert least.kv_heads <= min(widths)
        assert most.kv_heads == max(widths)
        assert most.feed_forward == -(-101 // tp)
