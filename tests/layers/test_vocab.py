"""The vocabulary's two ends against unsharded twins; float64, to 1e-12 (another order of summation is 1e-15)."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwright.comm.group import Call, Group
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.single import SingleGroup
from shardwright.errors import UsageError
from shardwright.layers.vocab import VocabParallelEmbedding, VocabParallelHead
from shardwright.layout.partition import Partition
from shardwright.testing.ranks import on_threads

HIDDEN = 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


@st.composite
def vocabularies(draw: st.DrawFn) -> Partition:
    """Up to 6 ranks, some of them without a word; at least one word in all."""
    widths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=6))
    return Partition.explicit(widths if any(widths) else [*widths[:-1], 1])


def check_ends(group: Group, vocabulary: Partition, ids: list[int]) -> list[Call]:
    """An embedding whose table is its own head: looked up, and logits taken, through one weight."""
    weight = random(vocabulary.size, HIDDEN).requires_grad_()
    x = F.embedding(torch.tensor(ids), weight)
    dlogits = random(len(ids), vocabulary.size, seed=1)
    logits = x @ weight.T
    logits.backward(dlogits)
    recording, rows = RecordingGroup(group), slice(*vocabulary.range(group.rank))
    table = VocabParallelEmbedding(vocabulary, HIDDEN, recording).double()
    table.load("weight", weight)
    found = table(torch.tensor(ids))
    assert torch.equal(found, x)
    mine = table.logits(found)
    mine.backward(dlogits[:, rows])
    close(mine, logits[:, rows])
    close(grad(table.weight), grad(weight)[rows])
    return recording.calls


@settings(max_examples=40, deadline=None, derandomize=True)
@given(vocabulary=vocabularies(), data=st.data())
def test_looking_up_and_tied_logits(vocabulary: Partition, data: st.DataObject) -> None:
    """Two all-reduces of T x H: of the rows looked up, exact since one rank gives what is not 0, and of dx."""
    ids = data.draw(st.lists(st.integers(0, vocabulary.size - 1), min_size=1, max_size=5))
    for calls in on_threads(vocabulary.ranks, check_ends, vocabulary, ids):
        assert [(call.tag, call.bytes) for call in calls] == [
            ("vocab", len(ids) * HIDDEN * 8),
            ("vocab.logits/grad", len(ids) * HIDDEN * 8),
        ]


def check_head(group: Group, vocabulary: Partition) -> list[Call]:
    weight, x = random(vocabulary.size, HIDDEN).requires_grad_(), random(4, HIDDEN, seed=1).requires_grad_()
    dlogits = random(4, vocabulary.size, seed=2)
    (x @ weight.T).backward(dlogits)
    recording, rows = RecordingGroup(group), slice(*vocabulary.range(group.rank))
    head = VocabParallelHead(vocabulary, HIDDEN, recording).double()
    head.load("weight", weight)
    mine = x.detach().clone().requires_grad_()
    logits = head(mine)
    logits.backward(dlogits[:, rows])
    close(logits, (x @ weight.T)[:, rows])
    close(grad(mine), grad(x))
    close(grad(head.weight), grad(weight)[rows])
    return recording.calls


@settings(max_examples=20, deadline=None, derandomize=True)
@given(vocabulary=vocabularies())
def test_head(vocabulary: Partition) -> None:
    for calls in on_threads(vocabulary.ranks, check_head, vocabulary):
        assert [call.tag for call in calls] == ["vocab.logits/grad"]


@pytest.mark.parametrize("ranks", [1, 3, 9])
def test_no_padded_words(ranks: int) -> None:
    """7 words are 7 logits over all ranks, however many there are: nothing that a softmax would count besides."""

    def width(group: Group) -> int:
        table = VocabParallelHead(Partition.balanced(7, group.size), HIDDEN, group)
        return int(table(torch.zeros(1, HIDDEN)).shape[1])

    assert sum(on_threads(ranks, width)) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_looking_up_halves_is_exact(dtype: torch.dtype) -> None:
    def found(group: Group) -> Tensor:
        table = VocabParallelEmbedding(Partition.balanced(7, group.size), HIDDEN, group).to(dtype)
        x: Tensor = table(torch.arange(7))
        return x

    [whole] = on_threads(1, found)
    assert all(torch.equal(x, whole) for x in on_threads(5, found))


def test_an_id_outside_gives_zeros() -> None:
    table = VocabParallelEmbedding(Partition.balanced(7, 1), HIDDEN, SingleGroup())
    assert not table(torch.tensor([-1, 7])).any()
    assert table(torch.tensor([0, 6])).any(1).all()


def test_a_vocabulary_cut_over_another_number_of_ranks_is_refused() -> None:
    with pytest.raises(UsageError, match=r"partition=\(4, 3\): vocab runs on 1 ranks"):
        VocabParallelHead(Partition.balanced(7, 2), HIDDEN, SingleGroup())
