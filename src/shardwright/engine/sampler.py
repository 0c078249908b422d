"""From each rank's logits to one token, the same on all ranks, with one small exchange.

Sampling is an argmax too: of logits over temperature plus Gumbel noise, which each rank draws for its own words from
(seed, position, word). So the token does not depend on the split, and the exchange is a (value, word) pair a rank.
"""

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from shardwright.comm.group import Group
from shardwright.engine.request import Sequence
from shardwright.layers import random
from shardwright.layout.partition import Partition


def sample(logits: Tensor, sequences: Rows[Sequence], vocabulary: Partition, group: Group) -> list[int]:
    """`logits [B, V_r]`, one row a sequence → its next token; of equal values the lowest word wins."""
    start, stop = vocabulary.range(group.rank)
    scores = logits.double()
    words = torch.arange(start, stop)
    for row, sequence in enumerate(sequences):
        params = sequence.request.params
        if params.temperature > 0:
            noise = random.gumbel(params.seed, "sample", sequence.generated, words)
            scores[row] = scores[row] / params.temperature + noise
    best = torch.full((1, len(sequences), 2), -torch.inf, dtype=torch.float64)
    if len(words):
        values, places = scores.max(-1)
        best[0] = torch.stack((values, (places + start).double()), -1)
    offers = group.all_gather(best, 0, [1] * group.size, tag="token")
    winners = offers[..., 0].max(0).indices
    return [int(offers[rank, row, 1]) for row, rank in enumerate(winners.tolist())]
