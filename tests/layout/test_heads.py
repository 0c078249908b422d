"""`HeadPartition`: KV heads follow the query heads that need them, for any heads and ranks, against a plain loop."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.errors import UsageError
from shardwright.layout.heads import HeadPartition
from shardwright.layout.partition import Partition

groups = st.integers(1, 20).flatmap(
    lambda kv: st.tuples(st.integers(1, 20 // kv).map(lambda group: kv * group), st.just(kv))
)
"""(query heads, KV heads) of any grouped-query attention up to 20 query heads."""


@st.composite
def partitions(draw: st.DrawFn) -> HeadPartition:
    """Balanced, weighted or any explicit cut of the query heads over 1…20 ranks."""
    heads, kv_heads = draw(groups)
    ranks = draw(st.integers(1, 20))
    cut = draw(st.sampled_from(["balanced", "weighted", "explicit"]))
    if cut == "balanced":
        return HeadPartition.balanced(heads, kv_heads, ranks)
    if cut == "weighted":
        shares = draw(st.lists(st.integers(0, 4), min_size=ranks, max_size=ranks).filter(any))
        return HeadPartition(Partition.weighted(heads, shares), kv_heads)
    cuts = sorted(draw(st.lists(st.integers(0, heads), min_size=ranks - 1, max_size=ranks - 1)))
    return HeadPartition(Partition.explicit([b - a for a, b in zip([0, *cuts], [*cuts, heads], strict=True)]), kv_heads)


def needed(cut: HeadPartition, rank: int) -> list[int]:
    """The plain loop: for each query head of the rank the KV head it reads, each once."""
    found: list[int] = []
    start, stop = cut.query.range(rank)
    for head in range(start, stop):
        kv = head * cut.kv_heads // cut.heads
        if kv not in found:
            found.append(kv)
    return found


@given(partitions())
def test_a_rank_holds_the_kv_heads_it_needs_and_no_other(cut: HeadPartition) -> None:
    for rank in range(cut.ranks):
        assert list(range(*cut.kv_range(rank))) == needed(cut, rank)
        assert cut.kv_width(rank) == len(needed(cut, rank))


@given(partitions())
def test_every_query_head_reads_its_own_kv_head(cut: HeadPartition) -> None:
    seen = []
    for rank in range(cut.ranks):
        first = cut.kv_range(rank)[0]
        index = cut.kv_index(rank)
        assert len(index) == cut.query.widths[rank]
        assert all(0 <= local < cut.kv_width(rank) for local in index)
        seen += [first + local for local in index]
    assert seen == [head * cut.kv_heads // cut.heads for head in range(cut.heads)]


@given(partitions())
def test_a_kv_head_is_replicated_exactly_where_its_group_straddles_ranks(cut: HeadPartition) -> None:
    owner = [rank for rank, width in enumerate(cut.query.widths) for _ in range(width)]
    for kv in range(cut.kv_heads):
        group = owner[kv * cut.group : (kv + 1) * cut.group]
        assert cut.kv_holders(kv) == tuple(sorted(set(group)))
    assert sum(map(cut.kv_width, range(cut.ranks))) == sum(len(cut.kv_holders(kv)) for kv in range(cut.kv_heads))


def test_more_ranks_than_heads() -> None:
    cut = HeadPartition.balanced(9, 3, 11)
    assert [cut.kv_range(rank) for rank in (0, 8, 9, 10)] == [(0, 1), (2, 3), (0, 0), (0, 0)]
    assert cut.kv_holders(1) == (3, 4, 5)
    assert (cut.heads, cut.ranks, cut.group, cut.kv_index(10)) == (9, 11, 3, ())


def test_the_embedded_model_at_two_ranks() -> None:
    """9 query heads over 3 KV heads are 5 and 4: the middle KV head is on both ranks."""
    cut = HeadPartition.balanced(9, 3, 2)
    assert (cut.kv_range(0), cut.kv_range(1), cut.kv_holders(1)) == ((0, 2), (1, 3), (0, 1))
    assert (cut.kv_index(0), cut.kv_index(1)) == ((0, 0, 0, 1, 1), (0, 1, 1, 1))


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 2), (4, 0), (4, -2), (2, 4)])
def test_heads_that_do_not_group_are_refused(heads: int, kv_heads: int) -> None:
    with pytest.raises(
        UsageError, match=rf"kv_heads={kv_heads}: .* the {heads} query heads; check num_attention_heads"
    ):
        HeadPartition.balanced(heads, kv_heads, 2)
