"""`Batch`: rows and positions of sequences laid end to end."""

import torch

from shardwright.layers.batch import Batch


def test_whole_sequences_start_at_their_first_position() -> None:
    batch = Batch.whole([[5, 6, 7], [], [8]])
    assert batch.tokens.tolist() == [5, 6, 7, 8]
    assert batch.positions.tolist() == [0, 1, 2, 0]
    assert batch.lengths == batch.held == (3, 0, 1)
    assert batch.ranges == [(0, 3), (3, 3), (3, 4)]
    assert batch.rows is None


def test_no_sequences_are_an_empty_batch() -> None:
    batch = Batch.whole([])
    assert batch.tokens.dtype == batch.positions.dtype == torch.int64
    assert len(batch.tokens) == len(batch.positions) == len(batch.ranges) == 0
