"""From each rank's logits to one token, the same on all ranks, with one small exchange.

Sampling is an argmax too: of logits over temperature plus Gumbel noise, which each rank draws for its own words from
(seed, position, word). So the token does not depend on the split, and the exchange is a (value, word) pair a rank. Only
where a request filters words by their probability are its logits gathered first; then all ranks filter the same row.
"""

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from shardwright.comm.group import Group
from shardwright.engine.request import SamplingParams, Sequence
from shardwright.layers import random
from shardwright.layout.partition import Partition


def sample(logits: Tensor, sequences: Rows[Sequence], vocabulary: Partition, group: Group) -> list[int]:
    """`logits [B, V_r]`, one row a sequence → its next token; of equal values the lowest word wins."""
    start, stop = vocabulary.range(group.rank)
    scores = logits.double()
    for row, sequence in enumerate(sequences):
        if sequence.request.params.temperature > 0:
            scores[row] /= sequence.request.params.temperature
    _filter(scores, sequences, vocabulary, group)
    words = torch.arange(start, stop)
    for row, sequence in enumerate(sequences):
        params = sequence.request.params
        if params.temperature > 0:
            scores[row] += random.gumbel(params.seed, "sample", sequence.generated, words)
    best = torch.full((1, len(sequences), 2), -torch.inf, dtype=torch.float64)
    if len(words):
        values, places = scores.max(-1)
        best[0] = torch.stack((values, (places + start).double()), -1)
    offers = group.all_gather(best, 0, [1] * group.size, tag="token")
    winners = offers[..., 0].max(0).indices
    return [int(offers[rank, row, 1]) for row, rank in enumerate(winners.tolist())]


def _filter(scores: Tensor, sequences: Rows[Sequence], vocabulary: Partition, group: Group) -> None:
    """Put minus infinity where a request's filters leave a word out; one exchange for all rows that have any."""
    rows = [row for row, sequence in enumerate(sequences) if sequence.request.params.filtered]
    if not rows:
        return
    whole = group.all_gather(scores[rows], 1, vocabulary.widths, tag="logits")
    start, stop = vocabulary.range(group.rank)
    for row, distribution in zip(rows, whole, strict=True):
        kept = kept_words(distribution, sequences[row].request.params)
        scores[row].masked_fill_(~kept[start:stop], -torch.inf)


def kept_words(scores: Tensor, params: SamplingParams) -> Tensor:
    """Which words of a row `[V]`, divided by its temperature, may be drawn; of equal ones the lower goes first."""
    ordered, words = scores.sort(descending=True, stable=True)
    kept = torch.ones_like(words, dtype=torch.bool)
    if params.top_k:
        kept[params.top_k :] = False
    probabilities = ordered.masked_fill(~kept, -torch.inf).softmax(0)
    kept &= probabilities.cumsum(0) - probabilities < params.top_p
    probabilities = ordered.masked_fill(~kept, -torch.inf).softmax(0)
    kept &= probabilities >= params.min_p * probabilities[0]
    return torch.zeros_like(kept).scatter(0, words, kept)
