"""Decoding through pages equals computing whole texts anew: any page size, any schedule, any split.

In float64. To 1e-6 of the largest logit: a chunk sums in another order (1e-15), and the float32 cosines of a vector of
other length may differ in their last bit (6e-8). A token that misses one key moves logits by 1e-3.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwright.comm import regions
from shardwright.comm.group import Group
from shardwright.comm.single import SingleGroup
from shardwright.errors import UsageError
from shardwright.layers.batch import Batch
from shardwright.layers.kv import PagedKV
from shardwright.models.decoder import Decoder
from shardwright.testing.models import tiny_config
from shardwright.testing.ranks import on_threads

VARIANTS: list[dict[str, Any]] = [
    {},
    {"family": "qwen3", "qk_norm": True, "heads": 5, "kv_heads": 1},
    {"tied": True, "heads": 9, "kv_heads": 3, "qkv_bias": True},
]


@dataclass(frozen=True)
class Schedule:
    """Texts, and for each step how many tokens of which of them are computed: prefill, chunked or not, and decode."""

    texts: list[list[int]]
    steps: list[list[tuple[int, int]]]
    page: int

    @property
    def tables(self) -> list[tuple[int, ...]]:
        """Pages of all texts, dealt out in turn so that neighbours in a text are no neighbours in memory."""
        each = -(-max(map(len, self.texts)) // self.page)
        return [tuple(range(i, each * len(self.texts), len(self.texts)))[::-1] for i in range(len(self.texts))]


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    texts = [[(7 * i + j * j) % 23 for j in range(length)] for i, length in enumerate(lengths)]
    left, steps = list(lengths), []
    while any(left):
        step = [(i, min(left[i], draw(st.integers(0, 4)))) for i in range(len(left)) if left[i] and draw(st.booleans())]
        for i, count in step:
            left[i] -= count
        steps.append(step or [(i, count) for i, count in enumerate(left) if count])
        if not step:
            left = [0] * len(left)
    return Schedule(texts, steps, page=draw(st.sampled_from((1, 2, 3, 4, 5, 6, 7, 9))))


def gathered(model: Decoder, logits: Tensor) -> Tensor:
    return regions.gather(logits, 1, model.cuts.vocabulary.widths, model.group)


def check_schedule(group: Group, schedule: Schedule, changes: dict[str, Any]) -> None:
    model = Decoder(tiny_config(**changes), group).double()
    for layer in model.layers:  # so that attention is far from uniform
        layer.attention.qkv.weight.data.mul_(30)
    tables, config = schedule.tables, model.config
    pages = 1 + max(page for table in tables for page in table)
    heads = model.cuts.heads.kv_width(group.rank)
    stores = [PagedKV(schedule.page, heads, config.head_size, torch.float64, pages) for _ in model.layers]
    found: list[list[Tensor]] = [[] for _ in schedule.texts]
    held = [0] * len(schedule.texts)
    with torch.inference_mode():
        whole = Batch.whole(schedule.texts)
        expected = gathered(model, model(whole))
        for step in schedule.steps:
            spans = [(i, held[i], held[i] + count) for i, count in step]
            batch = Batch(
                tokens=torch.tensor([t for i, start, stop in spans for t in schedule.texts[i][start:stop]]).long(),
                positions=torch.tensor([p for _, start, stop in spans for p in range(start, stop)]).long(),
                lengths=tuple(count for _, count in step),
                held=tuple(stop for _, _, stop in spans),
                tables=tuple(tables[i][: -(-stop // schedule.page)] for i, _, stop in spans),
            )
            logits = gathered(model, model(batch, stores))
            for (i, _, stop), (first, last) in zip(spans, batch.ranges, strict=True):
                found[i].append(logits[first:last])
                held[i] = stop
    assert held == [len(text) for text in schedule.texts]
    joined = torch.cat([torch.cat(parts) for parts in found])
    assert (joined - expected).abs().max() <= 1e-6 * expected.abs().max()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(schedule=schedules(), tp=st.integers(1, 4), changes=st.sampled_from(VARIANTS))
def test_any_schedule_gives_the_logits_of_whole_texts(schedule: Schedule, tp: int, changes: dict[str, Any]) -> None:
    on_threads(tp, check_schedule, schedule, changes)


@pytest.mark.long
@settings(max_examples=1000, deadline=None)
@given(schedule=schedules(), tp=st.integers(1, 12), changes=st.sampled_from(VARIANTS))
def test_any_schedule_many_more(schedule: Schedule, tp: int, changes: dict[str, Any]) -> None:
    on_threads(tp, check_schedule, schedule, changes)


def test_decoding_token_by_token_in_company_and_alone() -> None:
    """A long prompt, a short one and an empty chunk, then single tokens: on 7 ranks, one of them without heads."""
    texts = [[3, 1, 4, 1, 5, 9, 2, 6], [22, 7], [8]]
    steps = [[(0, 6), (1, 1), (2, 0)], [(0, 1), (1, 1)], [(2, 1), (0, 1)]]
    for page in (1, 3, 8):
        on_threads(7, check_schedule, Schedule(texts, steps, page), {})


def test_gradients_through_pages_are_refused() -> None:
    """They would stop at the pages; nothing tells a trainer that its keys learned nothing."""
    config = tiny_config()
    model = Decoder(config, SingleGroup())
    stores = [PagedKV(4, config.kv_heads, config.head_size, torch.float32, 1) for _ in model.layers]
    batch = Batch(torch.tensor([1, 2]), torch.arange(2), (2,), (2,), ((0,),))
    with pytest.raises(UsageError, match=r"kv=PagedKV: pages keep no graph.*; decode in torch.inference_mode\(\)"):
        model(batch, stores)
    with torch.no_grad():
        assert model(batch, stores).shape == (2, 23)
