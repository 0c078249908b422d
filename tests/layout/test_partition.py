"""`Partition`: every constructor against a plain loop, and the rules that every cut keeps."""

from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.errors import UsageError
from shardwright.layout.partition import Partition

sizes = st.integers(0, 200)
ranks = st.integers(1, 20)
granules = st.integers(1, 9)


def check_rules(partition: Partition, size: int, count: int, granule: int) -> None:
    """Widths sum to the size, ranges follow each other, and every range that is not empty starts on a granule."""
    assert (partition.size, partition.ranks, partition.granule) == (size, count, granule)
    stop = 0
    for rank in range(count):
        start, end = partition.range(rank)
        assert start == stop == partition.offsets[rank]
        assert end - start == partition.widths[rank] >= 0
        assert start % granule == 0 or start == end
        stop = end
    assert stop == size


def owners(partition: Partition) -> list[int]:
    return [rank for rank, width in enumerate(partition.widths) for _ in range(width)]


@given(sizes, ranks, granules)
def test_balanced_deals_granules_out_one_by_one(size: int, count: int, granule: int) -> None:
    partition = Partition.balanced(size, count, granule)
    check_rules(partition, size, count, granule)
    held = [0] * count
    for index in range(-(-size // granule)):
        held[index % count] += 1
    assert [-(-width // granule) for width in partition.widths] == held
    assert max(partition.widths) - min(partition.widths) <= granule or size % granule


@given(sizes, ranks, granules)
def test_remainder_last_is_the_floor_everywhere_and_the_rest_at_the_end(size: int, count: int, granule: int) -> None:
    partition = Partition.remainder_last(size, count, granule)
    check_rules(partition, size, count, granule)
    floor = -(-size // granule) // count * granule
    assert partition.widths[:-1] == (min(floor, size),) * (count - 1)
    assert partition.widths[-1] == size - sum(partition.widths[:-1])


shares = st.lists(
    st.one_of(st.integers(0, 5), st.floats(0, 1e308, allow_subnormal=True)), min_size=1, max_size=12
).filter(any)


def largest_remainder(granules: int, weights: list[float]) -> list[int]:
    """In exact fractions: the floor of each quota, then one each to the largest remainders, the lower rank first."""
    total = sum(Fraction(weight) for weight in weights)
    quotas = [granules * Fraction(weight) / total for weight in weights]
    counts = [quota.numerator // quota.denominator for quota in quotas]
    while sum(counts) < granules:
        remainders = [quota - count for quota, count in zip(quotas, counts, strict=True)]
        counts[remainders.index(max(remainders))] += 1
    return counts


@given(sizes, shares, granules)
def test_weighted_is_largest_remainder(size: int, weights: list[float], granule: int) -> None:
    partition = Partition.weighted(size, weights, granule)
    check_rules(partition, size, len(weights), granule)
    expected = largest_remainder(-(-size // granule), weights)
    assert [-(-width // granule) for width in partition.widths] == expected
    assert all(width == 0 for width, weight in zip(partition.widths, weights, strict=True) if weight == 0)


def test_weighted_breaks_ties_by_rank_where_thirds_are_rounded() -> None:
    """2 over 4 : 1 : 1 is 1⅓, ⅓, ⅓: three equal remainders, of which floating point makes the first the smallest."""
    assert Partition.weighted(2, [4, 1, 1]).widths == (2, 0, 0)


def test_weighted_takes_any_finite_shares() -> None:
    """Also those whose sum or product leaves the range of a float."""
    assert Partition.weighted(100, [1e308, 1e308]).widths == (50, 50)
    assert Partition.weighted(4, [5e-324, 15e-324]).widths == (1, 3)


@given(sizes, ranks, granules)
def test_equal_weights_are_balanced(size: int, count: int, granule: int) -> None:
    assert Partition.weighted(size, [0.1] * count, granule) == Partition.balanced(size, count, granule)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 5))
def test_explicit_keeps_widths_and_times_counts_in_smaller_units(widths: list[int], factor: int) -> None:
    partition = Partition.explicit(widths)
    check_rules(partition, sum(widths), len(widths), 1)
    assert partition.widths == tuple(widths)
    finer = partition.times(factor)
    check_rules(finer, sum(widths) * factor, len(widths), factor)
    assert owners(finer) == [rank for rank in owners(partition) for _ in range(factor)]


@given(sizes, ranks, granules, st.integers(1, 5))
def test_times_commutes_with_balanced(size: int, count: int, granule: int, factor: int) -> None:
    assert Partition.balanced(size, count, granule).times(factor) == Partition.balanced(
        size * factor, count, granule * factor
    )


def test_the_classical_examples() -> None:
    assert Partition.balanced(25, 4).widths == (7, 6, 6, 6)
    assert Partition.remainder_last(25, 4).widths == (6, 6, 6, 7)
    assert Partition.balanced(2, 4).widths == (1, 1, 0, 0)
    assert Partition.remainder_last(2, 4).widths == (0, 0, 0, 2)
    assert Partition.balanced(10, 3, granule=4).widths == (4, 4, 2)
    assert Partition.weighted(10, [3, 0, 1]).widths == (8, 0, 2)


def test_the_last_granule_may_be_short_wherever_it_falls() -> None:
    assert Partition.explicit((3, 0, 0), granule=2).size == 3
    with pytest.raises(UsageError, match=r"rank 2 starts at 3, inside a granule of 2; cut at multiples"):
        Partition.explicit((3, 0, 1), granule=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Partition.balanced(-1, 2), "size=-1: a dimension is not negative; pass the length"),
        (lambda: Partition.balanced(4, 0), "ranks=0: a partition needs at least one rank; pass 1"),
        (lambda: Partition.remainder_last(4, -3), "ranks=-3: a partition needs at least one rank"),
        (lambda: Partition.balanced(4, 2, 0), "granule=0: a granule is at least 1; leave it out"),
        (lambda: Partition.explicit([4], 0), "granule=0: a granule is at least 1"),
        (lambda: Partition.explicit([]), r"widths=\(\): a partition needs at least one rank"),
        (lambda: Partition.explicit([2, -1, 3]), r"widths=\(2, -1, 3\): rank 1 has a negative width; use 0"),
        (lambda: Partition.weighted(4, []), "ranks=0: a partition needs at least one rank"),
        (lambda: Partition.weighted(4, [0, 0]), r"shares=\[0, 0\]: shares are finite, not negative and not all zero"),
        (lambda: Partition.weighted(4, [1, -1]), r"shares=\[1, -1\]"),
        (lambda: Partition.weighted(4, [1, float("nan")]), r"shares=\[1, nan\]"),
        (lambda: Partition.weighted(4, [float("nan"), 1]), r"shares=\[nan, 1\]"),
        (lambda: Partition.weighted(4, [1, float("inf")]), r"shares=\[1, inf\]"),
    ],
)
def test_wrong_arguments_are_named(make: Callable[[], Partition], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
