"""One token on all ranks, whatever the split; draws that follow the softmax."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from shardwright.comm.group import Group
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.single import SingleGroup
from shardwright.comm.thread import ThreadGroup
from shardwright.engine.request import Request, SamplingParams, Sequence
from shardwright.engine.sampler import kept_words, sample
from shardwright.layout.partition import Partition


def sequence(temperature: float, seed: int = 0, generated: int = 0) -> Sequence:
    request = Request(number=0, tokens=(1, 2), params=SamplingParams(temperature=temperature, seed=seed))
    return Sequence(request, [1, 2] + [0] * generated)


def on(group: Group, logits: Tensor, sequences: list[Sequence], cut: Partition) -> list[int]:
    start, stop = cut.range(group.rank)
    return sample(logits[:, start:stop].clone(), sequences, cut, group)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 11])
def test_ranks_agree_with_the_whole(ranks: int) -> None:
    """7 words, so 11 ranks leave some empty; greedy rows and drawn rows in one batch."""
    logits = torch.arange(28.0).sin().view(4, 7) * 3
    sequences = [sequence(0), sequence(1.0, seed=3), sequence(0.5, seed=4, generated=9), sequence(0)]
    whole = on(SingleGroup(), logits, sequences, Partition.balanced(7, 1))
    assert [whole[0], whole[3]] == logits.argmax(-1)[[0, 3]].tolist()
    cut = Partition.balanced(7, ranks)
    assert ThreadGroup.run(ranks, lambda group: on(group, logits, sequences, cut)) == [whole] * ranks


def test_of_equal_logits_the_lowest_word_wins_across_ranks() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, 5.0, 5.0]])
    cut = Partition.balanced(5, 3)
    assert ThreadGroup.run(3, lambda group: on(group, logits, [sequence(0)], cut)) == [[1]] * 3


def test_one_exchange_of_two_numbers_a_sequence() -> None:
    recorder = RecordingGroup(SingleGroup())
    sample(torch.zeros(3, 7), [sequence(0)] * 3, Partition.balanced(7, 1), recorder)
    assert [(call.op, call.bytes, call.tag) for call in recorder.calls] == [("all_gather", 3 * 16, "token")]


def test_draws_follow_the_softmax() -> None:
    """4000 draws at seeds 0…3999; 4 standard deviations of a count, so a right sampler fails at no word in 10 000."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    draws = 4000
    counts = torch.zeros(4)
    for seed in range(draws):
        (token,) = on(SingleGroup(), logits[None], [sequence(2.0, seed)], Partition.balanced(4, 1))
        counts[token] += 1
    expected = (logits / 2.0).softmax(-1) * draws
    assert ((counts - expected).abs() < 4 * expected.sqrt()).all()


def test_the_position_changes_the_draw() -> None:
    logits = torch.zeros(1, 1000)
    cut = Partition.balanced(1000, 1)
    tokens = {on(SingleGroup(), logits, [sequence(1.0, 1, generated)], cut)[0] for generated in range(20)}
    assert len(tokens) > 15


FILTERS = [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.8, "min_p": 0.1}, {"top_p": 1e-9}]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_keep_what_transformers_keeps(filters: dict[str, Any]) -> None:
    """Its own processors, in its own order, over rows without equal values (of which it keeps all at a limit)."""
    warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    scores = (torch.arange(40.0, dtype=torch.float64) * 1.7).sin().view(1, 40) * 3
    expected = scores.clone()
    for name, value in filters.items():
        expected = warpers[name](value)(None, expected)
    kept = kept_words(scores[0], SamplingParams(temperature=1.0, **filters))
    assert kept.tolist() == expected[0].isfinite().tolist()


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_filtered_draws_are_the_same_at_every_split(ranks: int) -> None:
    """One gather for the rows that filter, then the usual exchange; draws stay among the kept words."""
    logits = torch.arange(66.0).sin().view(3, 22) * 4
    params = [SamplingParams(temperature=1.5, top_k=4, seed=s) for s in range(2)] + [SamplingParams()]
    sequences = [Sequence(Request(number=0, tokens=(1,), params=p), [1]) for p in params]
    whole = on(SingleGroup(), logits, sequences, Partition.balanced(22, 1))
    assert all(token in row.topk(4).indices for token, row in zip(whole[:2], logits, strict=False))
    cut = Partition.balanced(22, ranks)
    recorders: list[RecordingGroup] = []

    def drawn(group: Group) -> list[int]:
        recorder = RecordingGroup(group)
        recorders.append(recorder)
        return on(recorder, logits, sequences, cut)

    assert ThreadGroup.run(ranks, drawn) == [whole] * ranks
    assert [call.tag for call in recorders[0].calls] == ["logits", "token"]
