"""`Flow`: how one forward's activations are spread over the ranks, kept for the backward, and dropped."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from shardwright.comm.group import Group
from shardwright.layers.dropout import Dropout
from shardwright.layers.recompute import Block, Keep, KeepAll
from shardwright.layers.rows import WHOLE, Rows


@dataclass(frozen=True)
class Flow:
    """rows: of the residual stream on each rank · keep: what is computed again in the backward · dropout: on what is
    added to the residual stream and on attention's weights, or None.
    """

    rows: Rows = WHOLE
    keep: Keep = field(default_factory=KeepAll)
    dropout: Dropout | None = None

    def spread(self, rows: Rows) -> "Flow":
        """The same with other rows."""
        return self if rows is self.rows else replace(self, rows=rows)

    def block(self, run: Block, x: Tensor) -> Tensor:
        """A block of the residual stream, norm included, run as `keep` says."""
        return self.keep.block(run, x, self.rows)

    def dropped(self, x: Tensor, name: str, tokens: int, group: Group) -> Tensor:
        """`x`, which is about to join the residual stream at the place `name`, after dropout; `tokens` rows in all."""
        if self.dropout is None:
            return x
        return self.dropout(x, name, self.rows.mine(tokens, group.rank)[0])


DEFAULT = Flow()
"""Whole rows, everything kept, nothing dropped: inference, and training without further wishes."""
