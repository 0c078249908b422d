"""`Batch`: rows and positions of sequences laid end to end."""

from dataclasses import replace

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


def test_whole_sequences_of_one_length_are_one_part() -> None:
    """Those of several lengths, or with a past, are a part each."""
    x = torch.arange(6)[:, None]
    batch = Batch.whole([[1, 2], [3, 4], [5, 6]])
    [stack] = batch.split(x)
    assert stack.tolist() == [[[0], [1]], [[2], [3]], [[4], [5]]]
    assert batch.parts == [(0, 6)]
    for other in (Batch.whole([[1, 2, 3], [4], [5, 6]]), replace(batch, held=(2, 3, 2)), Batch.whole([[1] * 6])):
        assert other.parts == other.ranges
        assert [part.tolist() for part in other.split(x)] == [x[start:stop].tolist() for start, stop in other.ranges]
    assert Batch.whole([[], []]).parts == [(0, 0), (0, 0)]
