"""The closed forms are exactly what the real layers do: operations, collectives, parameters, rank by rank.

The oracle is the decoder itself on meta tensors: torch's FLOP counter sees every product and attention, the recording
group every collective. Nothing is rounded, so everything is equal, not close.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shardwright.comm.planned import PlannedGroup
from shardwright.comm.recording import RecordingGroup
from shardwright.layers.batch import Batch
from shardwright.layout.heads import HeadPartition
from shardwright.models.config import ModelConfig
from shardwright.models.decoder import Decoder
from shardwright.models.families import FAMILIES, by_name
from shardwright.models.specs import Cuts, model_specs
from shardwright.plan import work
from shardwright.plan.blocks import Blocks
from shardwright.plan.declared import of_config
from shardwright.plan.memory import stage_parameters
from shardwright.testing.models import SHAPES, tiny_config

VARIANTS: dict[str, dict[str, Any]] = {name: dict(shape) for name, shape in SHAPES.items()} | {
    "tied": {"tied": True},
    "biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "biases, no grouping": {"qkv_bias": True, "kv_heads": 6},
    "side by side, norms on heads": {"block": "parallel", "qk_norm": True, "out_bias": True},
    "wide": {"heads": 8, "kv_heads": 8, "head_size": 16, "hidden": 128, "feed_forward": 300, "vocabulary": 1000},
}
"""Every family, each kind of layer in it, and what families might have."""

every = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
LENGTH = 24


def shares(config: ModelConfig, tp: int) -> Iterator[tuple[int, work.Share]]:
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
                gated=int(config.gated),
            ),
        )


@dataclass(frozen=True)
class Done:
    """What one pass asked for: operations, and how many collectives of which (op, bytes)."""

    operations: int
    collectives: Counter[tuple[str, int]]


def passes(config: ModelConfig, rank: int, tp: int) -> tuple[Done, Done]:
    """A forward and its backward, on meta tensors."""
    done = []
    with torch.device("meta"):
        group = RecordingGroup(PlannedGroup(rank, tp))
        model = Decoder(config, group)
        batch = Batch.whole([[1] * LENGTH], device="meta")
        loss = torch.zeros(())

        def forward() -> None:
            nonlocal loss
            loss = model(batch).sum()

        for run in (forward, lambda: loss.backward()):  # type: ignore[no-untyped-call]
            with FlopCounterMode(display=False) as counter:
                run()
            done.append(Done(counter.get_total_flops(), Counter((call.op, call.bytes) for call in group.calls)))
            group.calls.clear()
    return done[0], done[1]


def sums(blocks: Blocks, share: work.Share, each: float) -> Counter[tuple[str, int]]:
    """The all-reduces of all layers, `each` times T x H in a layer, one call a part, and one of T x H at an end."""
    whole, normed = work.activation_bytes(share, LENGTH, 4), work.norm_bytes(LENGTH)
    wide = Counter({("all_reduce", int(whole)): 1})
    wide += Counter({("all_reduce", int(whole * each / blocks.parts)): blocks.layers * blocks.parts})
    return wide + Counter({("all_reduce", int(normed)): blocks.layers * blocks.norm_sums})


@pytest.mark.parametrize("tp", [1, 2, 5])
@every
def test_operations_and_collectives(tp: int, changes: dict[str, Any]) -> None:
    """Forward: a layer's four products, attention with nothing skipped, the logits; an all-reduce of T x H for the
    embedding and those of the layers. Backward: twice the operations; the layers' all-reduces, and one for the logits.
    """
    config = tiny_config(**changes)
    blocks = of_config(config)
    for rank, share in shares(config, tp):
        forward, backward = passes(config, rank, tp)
        attention = work.attention_operations(LENGTH, LENGTH, share.heads, share.head_size)
        head = work.head_product(share, LENGTH)
        layer = sum(map(work.operations, work.products(share, LENGTH)))
        assert forward.operations == config.layers * (layer + attention) + work.operations(head)
        layer, of_head = (
            sum(work.operations(gradient) for product in products for gradient in work.backward(product))
            for products in (work.products(share, LENGTH), (head,))
        )
        assert backward.operations == config.layers * (layer + 2 * attention) + of_head
        assert forward.collectives == sums(blocks, share, blocks.sums)
        assert backward.collectives == sums(blocks, share, blocks.sums_back)


def test_every_family_is_held() -> None:
    assert {family.name for family in FAMILIES} <= {tiny_config(**changes).family for changes in VARIANTS.values()}


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 5, 7])
@every
def test_parameters(tp: int, changes: dict[str, Any]) -> None:
    """Every rank's bytes by the table that loading reads, which is what `generate --json` reports."""
    config = tiny_config(**changes)
    blocks = of_config(config)
    for rank, share in shares(config, tp):
        table = model_specs(config, Cuts.balanced(config, tp), rank, by_name(config.family).naming(config))
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
