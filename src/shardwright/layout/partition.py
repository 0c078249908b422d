"""The base type of the whole package: one dimension cut into contiguous ranges, one a rank.

Decides where cuts fall. Knows nothing of tensors, models or devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import isfinite

from shardwright.errors import UsageError

Range = tuple[int, int]
"""Start (included) and stop (excluded)."""


@dataclass(frozen=True)
class Partition:
    """A dimension cut into contiguous ranges, one a rank, in rank order.

    Cuts fall on multiples of `granule` (a head, a quantisation group, or their lcm), so that a granule has one owner;
    the last granule may be short. A width may be 0: that rank owns nothing and still enters every collective.
    """

    widths: tuple[int, ...]
    granule: int = 1

    def __post_init__(self) -> None:
        if not self.widths:
            raise UsageError("widths", self.widths, "a partition needs at least one rank", "give one width a rank")
        if self.granule < 1:
            raise UsageError("granule", self.granule, "a granule is at least 1", "leave it out for single elements")
        for rank, width in enumerate(self.widths):
            if width < 0:
                raise UsageError("widths", self.widths, f"rank {rank} has a negative width", "use 0 for an empty rank")
            if self.offsets[rank] % self.granule and width:
                raise UsageError(
                    "widths",
                    self.widths,
                    f"rank {rank} starts at {self.offsets[rank]}, inside a granule of {self.granule}",
                    "cut at multiples of the granule",
                )

    @classmethod
    def balanced(cls, size: int, ranks: int, granule: int = 1) -> "Partition":
        """Granules dealt out evenly, the remainder one each to the first ranks: 25 heads on 4 ranks are 7, 6, 6, 6."""
        _check(size, ranks, granule)
        base, extra = divmod(-(-size // granule), ranks)
        return cls._of_granules([base + (rank < extra) for rank in range(ranks)], size, granule)

    @classmethod
    def remainder_last(cls, size: int, ranks: int, granule: int = 1) -> "Partition":
        """The classical rule: the floor everywhere, and what is left over on the last rank."""
        _check(size, ranks, granule)
        granules = -(-size // granule)
        base = granules // ranks
        return cls._of_granules([base] * (ranks - 1) + [granules - base * (ranks - 1)], size, granule)

    @classmethod
    def weighted(cls, size: int, shares: Sequence[float], granule: int = 1) -> "Partition":
        """Granules in proportion to `shares` (speed or memory of unequal devices), by largest remainder.

        Exact: ties go to the lower rank, whatever floating point makes of a third; a share of 0 leaves its rank empty.
        """
        _check(size, len(shares), granule)
        if not all(map(isfinite, shares)) or max(shares) <= 0 or min(shares) < 0:
            raise UsageError(
                "shares", list(shares), "shares are finite, not negative and not all zero", "give one a rank"
            )
        granules = -(-size // granule)
        total = sum(map(Fraction, shares))
        quotas = [granules * Fraction(share) / total for share in shares]
        counts = [int(quota) for quota in quotas]
        by_remainder = sorted(range(len(shares)), key=lambda r: (counts[r] - quotas[r], r))
        for rank in by_remainder[: granules - sum(counts)]:
            counts[rank] += 1
        return cls._of_granules(counts, size, granule)

    @classmethod
    def explicit(cls, widths: Sequence[int], granule: int = 1) -> "Partition":
        """These widths, in rank order."""
        return cls(tuple(widths), granule)

    @classmethod
    def _of_granules(cls, counts: Sequence[int], size: int, granule: int) -> "Partition":
        stops = [min(count * granule, size) for count in accumulate(counts)]
        return cls(tuple(stop - start for start, stop in zip([0, *stops[:-1]], stops, strict=True)), granule)

    @property
    def size(self) -> int:
        """Elements in the whole dimension."""
        return sum(self.widths)

    @property
    def ranks(self) -> int:
        """How many ranks share it."""
        return len(self.widths)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each rank's range starts."""
        return (0, *accumulate(self.widths[:-1]))

    def range(self, rank: int) -> Range:
        """Start and stop of one rank's range."""
        start = self.offsets[rank]
        return start, start + self.widths[rank]

    def times(self, factor: int) -> "Partition":
        """The same cut counted in smaller units: of heads into rows, say, with `factor` rows a head."""
        return Partition(tuple(width * factor for width in self.widths), self.granule * factor)


def _check(size: int, ranks: int, granule: int) -> None:
    if size < 0:
        raise UsageError("size", size, "a dimension is not negative", "pass the length of the dimension")
    if ranks < 1:
        raise UsageError("ranks", ranks, "a partition needs at least one rank", "pass 1 or more")
    if granule < 1:
        raise UsageError("granule", granule, "a granule is at least 1", "leave it out for single elements")
