"""Sequences out of a row of tokens, their order, and the batches each data rank makes of a step's.

Decides that the order depends on seed and epoch alone, so that it is the same at every split; that the last sequences
are kept for evaluation; and that the last of all may be short.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shardwright.errors import UsageError
from shardwright.layers import random
from shardwright.layers.batch import Batch
from shardwright.layout.partition import Partition
from shardwright.train.corpus import Row


@dataclass(frozen=True)
class Micro:
    """What one forward and backward take. targets `[T]`: the token after each · first_row: of its first token, the
    number in the whole step's batch.
    """

    batch: Batch
    targets: Tensor
    first_row: int


class Windows:
    """A row of tokens cut into sequences of `length`; a share of them, the last, is for validation."""

    def __init__(self, row: Row, length: int, validation: float, seed: int) -> None:
        self.row, self.length, self.seed = row, length, seed
        total = -(-(len(row) - 1) // length)
        self.held_out = range(total - int(total * validation), total)
        self.training = self.held_out.start
        if self.training < 1:
            problem = f"they have {len(row):,} tokens, and one sequence needs 2 at least"
            raise UsageError("data.paths", f"<{len(row):,} tokens>", problem, "add text")
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def of_step(self, step: int, batch: int) -> list[int]:
        """The sequences of a step (counted from 0), in their order; epochs follow one another."""
        return [self._at(number) for number in range(step * batch, (step + 1) * batch)]

    def _at(self, number: int) -> int:
        epoch, index = divmod(number, self.training)
        if epoch != self._epoch:
            keys = random.uniform(self.seed, "data order", epoch, torch.arange(self.training))
            self._epoch, self._order = epoch, keys.argsort().numpy()
        return int(self._order[index])

    def targets(self, window: int) -> int:
        """How many tokens of a sequence have a next one."""
        return min(self.length, len(self.row) - 1 - window * self.length)

    def micros(self, windows: Sequence[int], rank: int, ranks: int, size: int) -> list[Micro]:
        """One data rank's share of these sequences, at most `size` at a time."""
        start, stop = Partition.balanced(len(windows), ranks).range(rank)
        made, row = [], sum(map(self.targets, windows[:start]))
        for at in range(start, stop, size):
            taken = windows[at : min(at + size, stop)]
            micro = self._micro(taken, row)
            row += len(micro.targets)
            made.append(micro)
        return made

    def _micro(self, windows: Sequence[int], first_row: int) -> Micro:
        lengths = tuple(map(self.targets, windows))
        starts = [window * self.length for window in windows]
        pairs = list(zip(starts, lengths, strict=True))
        tokens = np.concatenate([self.row[at : at + length] for at, length in pairs]).astype(np.int64)
        targets = np.concatenate([self.row[at + 1 : at + 1 + length] for at, length in pairs]).astype(np.int64)
        positions = torch.cat([torch.arange(length) for length in lengths])
        batch = Batch(torch.from_numpy(tokens), positions, lengths, held=lengths)
        return Micro(batch, torch.from_numpy(targets), first_row)
