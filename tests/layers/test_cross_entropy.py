"""The loss from logits cut by vocabulary, against torch's over the whole; what it moves; words that are not there."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.comm.group import Group
from shardwright.comm.recording import RecordingGroup
from shardwright.layers.cross_entropy import vocab_parallel_cross_entropy
from shardwright.layout.partition import Partition
from shardwright.testing.ranks import on_threads

ROWS, WORDS = 7, 11


def whole(dtype: torch.dtype = torch.float64, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    logits = (torch.arange(ROWS * WORDS).double().sin() * scale).view(ROWS, WORDS).to(dtype)
    return logits, torch.tensor([0, 10, 4, -1, 5, 10, 3])


def check(group: Group, vocabulary: Partition, dtype: torch.dtype, scale: float) -> list[float]:
    """Loss of each row and gradients of this rank's logits, weighed row by row so that rows differ.

    float64: another order of summation, 1e-14. bfloat16: computed in float32 from the same logits; the gradient is
    rounded once, to 2^-8.
    """
    logits, targets = whole(dtype, scale)
    weights = torch.arange(1.0, ROWS + 1)
    twin = logits.double().clone().requires_grad_()
    expected = F.cross_entropy(twin, targets, reduction="none", ignore_index=-1)
    (expected * weights).sum().backward()
    start, stop = vocabulary.range(group.rank)
    mine = logits[:, start:stop].clone().requires_grad_()
    recording = RecordingGroup(group)
    loss = vocab_parallel_cross_entropy(mine, targets, vocabulary, recording)
    (loss * weights.to(loss.dtype)).sum().backward()
    assert [(call.op, call.tag) for call in recording.calls] == [("all_gather", "loss")]
    assert recording.calls[0].bytes == 3 * ROWS * loss.element_size()
    exact = dtype == torch.float64
    torch.testing.assert_close(loss.double(), expected, rtol=1e-14 if exact else 1e-6, atol=1e-14 if exact else 1e-5)
    assert mine.grad is not None
    assert twin.grad is not None
    found = mine.grad.double()
    torch.testing.assert_close(found, twin.grad[:, start:stop], rtol=1e-13 if exact else 2**-7, atol=1e-6)
    return loss.tolist()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_loss_and_its_gradients_are_those_of_the_whole(ranks: int, dtype: torch.dtype) -> None:
    """12 ranks over 11 words leave one without any. All ranks hold the same bits."""
    found = on_threads(ranks, check, Partition.balanced(WORDS, ranks), dtype, 3.0)
    assert all(loss == found[0] for loss in found)


def test_logits_far_apart_neither_overflow_nor_vanish() -> None:
    """The exponential of 1000 is no number; the largest of all ranks is taken off first."""
    on_threads(3, check, Partition.balanced(WORDS, 3), torch.float64, 1000.0)


def test_uneven_cuts_with_an_empty_rank_in_the_middle() -> None:
    on_threads(3, check, Partition.explicit([3, 0, 8]), torch.float64, 3.0)


def test_padded_vocabulary_stays_out_of_the_softmax() -> None:
    """The largest table a rank may hold is its words: the softmax over all ranks sums to 1 with nothing beside them."""

    def mass(group: Group) -> float:
        vocabulary = Partition.balanced(WORDS, group.size)
        mine = torch.zeros(1, vocabulary.widths[group.rank], dtype=torch.float64, requires_grad=True)
        loss = vocab_parallel_cross_entropy(mine, torch.tensor([0]), vocabulary, group)
        loss.sum().backward()
        assert mine.grad is not None
        return float(mine.grad.sum()) + (group.rank == 0)  # softmax minus the one-hot target

    assert sum(on_threads(4, mass)) == pytest.approx(1.0, abs=1e-14)


def test_no_rows_and_only_ignored_rows() -> None:
    def run(group: Group) -> list[float]:
        vocabulary = Partition.balanced(WORDS, group.size)
        mine = torch.ones(3, vocabulary.widths[group.rank], requires_grad=True)
        loss = vocab_parallel_cross_entropy(mine, torch.full((3,), -1), vocabulary, group)
        loss.sum().backward()
        assert mine.grad is not None
        assert not mine.grad.any()
        assert not len(vocab_parallel_cross_entropy(mine[:0], torch.empty(0, dtype=torch.int64), vocabulary, group))
        return loss.tolist()

    assert on_threads(2, run) == [[0.0] * 3] * 2
