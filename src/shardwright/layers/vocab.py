"""The two ends of a language model, cut by vocabulary: token ids in, logits out. No padded rows anywhere."""

from typing import final

from torch import Tensor

from shardwright.comm.group import Group
from shardwright.kernels.embedding import embedding
from shardwright.layers.layer import ParallelLayer
from shardwright.layers.rows import WHOLE, Rows
from shardwright.layout import sharding
from shardwright.layout.partition import Partition
from shardwright.layout.spec import Specs


class _VocabTable(ParallelLayer):
    """A table `[V, H]` of which this rank holds the rows `[V_r, H]`."""

    def __init__(self, vocabulary: Partition, hidden: int, group: Group, *, name: str = "vocab") -> None:
        super().__init__(group, name, vocabulary)
        self.vocabulary, self.hidden = vocabulary, hidden
        self._build()

    @final
    def _specs(self, rank: int, dtype: str) -> Specs:
        return sharding.vocab_table(self.vocabulary, self.hidden, rank, dtype=dtype)

    @final
    def logits(self, x: Tensor, rows: Rows = WHOLE) -> Tensor:
        """`x [T, H]`, or this rank's rows of it → this rank's logits `[T, V_r]`; the backward all-reduces dx."""
        return rows.enter(x, ((self.weight, None),), self.group, f"{self.name}.logits")[0]


@final
class VocabParallelEmbedding(_VocabTable):
    """Token ids to vectors. Each rank looks up the ids in its range and gives zeros for the rest.

    forward:   x = all_reduce(rows of w_r, or 0)        one all-reduce of T x H
    backward:  dw_r = the rows of dx that it looked up        nothing moves

    A tied model takes its logits from this same table, by `logits`.
    """

    def forward(self, ids: Tensor, rows: Rows = WHOLE) -> Tensor:
        """`ids [T]` int64, in 0…V-1 → `x [T, H]`, or this rank's rows of it; an id outside gives zeros."""
        start, stop = self.vocabulary.range(self.group.rank)
        if start == stop:  # still part of the graph: this rank's backward must enter the collectives the others' enter
            found = self.weight.new_zeros(*ids.shape, self.hidden) + self.weight.sum()
        else:
            found = embedding(ids, self.weight, start)
        return rows.total(found, self.group, self.name)


@final
class VocabParallelHead(_VocabTable):
    """The output projection of an untied model: `x [T, H]` → this rank's logits `[T, V_r]`; nothing moves forward."""

    def forward(self, x: Tensor, rows: Rows = WHOLE) -> Tensor:
        """`logits` under its other name."""
        return self.logits(x, rows)
