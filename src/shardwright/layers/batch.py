"""`Batch`: everything one forward reads besides weights and KV pages, stated explicitly."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences laid end to end: T tokens in all, sequence s contributing its next `lengths[s]` ones.

    tokens, positions `[T]` int64 · lengths: new tokens of each sequence · held: tokens of each sequence in the KV pages
    after this step · tables: the KV pages of each sequence, in order · rows: which of the T rows give logits, or None
    for all of them · known: tokens of each sequence known so far, computed or not; empty where that is `held`.
    """

    tokens: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    held: tuple[int, ...]
    tables: tuple[tuple[int, ...], ...] = ()
    rows: Tensor | None = None
    known: tuple[int, ...] = ()

    @classmethod
    def whole(cls, sequences: Sequence[Sequence[int]], device: str = "cpu") -> "Batch":
        """Whole sequences from their first token on, all logits wanted, no KV kept: training and scoring."""
        lengths = tuple(len(sequence) for sequence in sequences)
        tokens = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64, device=device)
        positions = torch.cat([torch.arange(length, device=device) for length in (0, *lengths)])
        return cls(tokens, positions, lengths, held=lengths)

    @cached_property
    def alike(self) -> bool:
        """Whether these are several sequences of one length, all of them whole."""
        first = self.lengths[0] if len(self.lengths) > 1 else 0
        return first > 0 and set(self.lengths) == {first} and self.held == self.lengths

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The rows of `x [T, ...]`, sequence by sequence; of sequences `alike` one stack, `[sequences, S, ...]`.

        The gradient of all is one tensor, put together once.
        """
        if self.alike:
            return (x.view(len(self.lengths), self.lengths[0], *x.shape[1:]),)
        return torch.split(x, list(self.lengths)) if self.lengths else ()

    @cached_property
    def parts(self) -> list[tuple[int, int]]:
        """Start (included) and stop (excluded) of the rows of each part that `split` gives."""
        return [(0, sum(self.lengths))] if self.alike else self.ranges

    @cached_property
    def ranges(self) -> list[tuple[int, int]]:
        """Start (included) and stop (excluded) of each sequence's rows."""
        stops = list(accumulate(self.lengths))
        return list(zip([0, *stops], stops, strict=False))
