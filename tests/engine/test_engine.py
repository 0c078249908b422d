"""The engine on a tiny model: batching, chunking and paging change nothing about what is generated."""

import pytest
import torch

from shardwright.comm.group import Group
from shardwright.comm.single import SingleGroup
from shardwright.comm.thread import ThreadGroup
from shardwright.engine.engine import Engine
from shardwright.engine.request import Finish, Request, SamplingParams
from shardwright.engine.scheduler import Scheduler
from shardwright.layers.batch import Batch
from shardwright.models.decoder import Decoder
from shardwright.testing.models import tiny_config

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8], [22], [9, 7, 9, 3, 2]]
CONFIG = tiny_config(context=16, family="qwen3", qk_norm=True)


def naive() -> list[tuple[list[int], Finish]]:
    """One prompt at a time, everything computed again for each token, in the unsharded model."""
    model = Decoder(CONFIG, SingleGroup()).double()
    found: list[tuple[list[int], Finish]] = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        with torch.inference_mode():
            while len(tokens) < 16 and len(tokens) < len(prompt) + 8:
                tokens.append(int(model(Batch.whole([tokens]))[-1].argmax()))
        found.append((tokens[len(prompt) :], "length"))
    return found


def continued(group: Group, page: int, budget: int, sequences: int) -> list[tuple[list[int], Finish]]:
    scheduler = Scheduler(CONFIG.context, page, sequences=sequences, budget=budget)
    engine = Engine(Decoder(CONFIG, group).double(), scheduler)
    for number, prompt in enumerate(PROMPTS):
        engine.add(Request(number=number, tokens=tuple(prompt), params=SamplingParams(max_tokens=8)))
    found: dict[int, list[int]] = {number: [] for number in range(len(PROMPTS))}
    ends: dict[int, Finish] = {}
    while engine.busy:
        for new in engine.step():
            found[new.number].append(new.token)
            if new.finish:
                ends[new.number] = new.finish
    return [(found[number], ends[number]) for number in range(len(PROMPTS))]


@pytest.mark.parametrize(("page", "budget", "sequences"), [(128, 2048, 16), (1, 3, 2), (3, 5, 4), (7, 1, 1)])
@pytest.mark.parametrize("ranks", [1, 3, 7])
def test_batches_chunks_and_pages_change_nothing(ranks: int, page: int, budget: int, sequences: int) -> None:
    """In float64, so that no two words of the tiny model are close enough for rounding to choose between them.

    The second prompt has 9 of 16 tokens and ends at the context, after 7.
    """
    expected = naive()
    assert len(expected[1][0]) == 7
    given = ThreadGroup.run(ranks, lambda group: continued(group, page, budget, sequences))
    assert given == [expected] * ranks
