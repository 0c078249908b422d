"""Who holds which attention heads: query heads are dealt out, KV heads follow them.

Grouped-query attention gives each KV head to `N / K` consecutive query heads. Query heads are cut like any other
dimension; a rank then holds every KV head its query heads need. A KV head is replicated exactly where its group
straddles ranks, so any number of ranks works, above the KV heads and above the heads too, without padding.
"""

from dataclasses import dataclass

from shardwright.errors import UsageError
from shardwright.layout.partition import Partition, Range


@dataclass(frozen=True)
class HeadPartition:
    """Query heads cut over ranks, and the KV heads each rank needs for its own."""

    query: Partition
    kv_heads: int

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.query.size % self.kv_heads:
            raise UsageError(
                "kv_heads",
                self.kv_heads,
                f"each KV head serves the same number of the {self.query.size} query heads",
                "check num_attention_heads and num_key_value_heads in the model's config",
            )

    @classmethod
    def balanced(cls, heads: int, kv_heads: int, ranks: int) -> "HeadPartition":
        """Query heads dealt out evenly."""
        return cls(Partition.balanced(heads, ranks), kv_heads)

    @property
    def heads(self) -> int:
        """Query heads of the whole model, `N`."""
        return self.query.size

    @property
    def ranks(self) -> int:
        """How many ranks share them."""
        return self.query.ranks

    @property
    def group(self) -> int:
        """Query heads that share one KV head, `N / K`."""
        return self.heads // self.kv_heads

    def kv_range(self, rank: int) -> Range:
        """The KV heads a rank holds: all that its query heads need, and no other."""
        start, stop = self.query.range(rank)
        return (0, 0) if start == stop else (start // self.group, -(-stop // self.group))

    def kv_width(self, rank: int) -> int:
        """How many KV heads a rank holds, `K_r`."""
        start, stop = self.kv_range(rank)
        return stop - start

    def kv_holders(self, head: int) -> tuple[int, ...]:
        """The ranks that hold one KV head, in order; more than one where its group straddles ranks."""
        ranges = [self.kv_range(rank) for rank in range(self.ranks)]
        return tuple(rank for rank, (start, stop) in enumerate(ranges) if start <= head < stop)

    def kv_index(self, rank: int) -> tuple[int, ...]:
        """For each of this rank's query heads, which of its own KV heads it reads."""
        start, stop = self.query.range(rank)
        first = self.kv_range(rank)[0]
        return tuple(head // self.group - first for head in range(start, stop))
