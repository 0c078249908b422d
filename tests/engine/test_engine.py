"""The engine on a tiny model: batching, chunking and paging change nothing about what is generated."""

import pytest
import torch

from shardwright.comm.group import Group
from shardwright.comm.single import SingleGroup
from shardwright.comm.thread import ThreadGroup
from shardwright.engine.engine import Engine
from shardwright.engine.request import NO_TOKEN, Finish, Request, SamplingParams
from shardwright.engine.scheduler import Scheduler
from shardwright.layers.batch import Batch
from shardwright.models.compilable import kv_dtype
from shardwright.models.config import ModelConfig
from shardwright.models.decoder import Decoder
from shardwright.models.rope import LongRopeScaling
from shardwright.testing.models import SHAPES, tiny_config

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8], [22], [9, 7, 9, 3, 2]]
LONGROPE = LongRopeScaling(short=(1.0, 2.0), long=(3.0, 70.0), original=6)
CONFIGS = {
    "qwen3": tiny_config(context=16, family="qwen3", qk_norm=True),
    "longrope": tiny_config(context=16, rope_scaling=LONGROPE),
    "gemma3": tiny_config(context=16, **SHAPES["gemma3"]),
}


def distinct(config: ModelConfig, group: Group) -> Decoder:
    """A model whose words depend on positions enough that another rotation shows."""
    model = Decoder(config, group).double()
    for layer in model.layers:
        layer.attention.qkv.weight.data.mul_(20)
    return model


def naive(config: ModelConfig) -> list[tuple[list[int], Finish]]:
    """One prompt at a time, everything computed again for each token, in the unsharded model."""
    model = distinct(config, SingleGroup())
    found: list[tuple[list[int], Finish]] = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        with torch.inference_mode():
            while len(tokens) < 16 and len(tokens) < len(prompt) + 8:
                tokens.append(int(model(Batch.whole([tokens]))[-1].argmax()))
        found.append((tokens[len(prompt) :], "length"))
    return found


def continued(
    group: Group, config: ModelConfig, page: int, budget: int, sequences: int
) -> list[tuple[list[int], Finish]]:
    restart = config.rope_scaling and config.rope_scaling.restart
    scheduler = Scheduler(config.context, page, sequences=sequences, budget=budget, restart=restart)
    engine = Engine(distinct(config, group), scheduler)
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
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_batches_chunks_and_pages_change_nothing(
    config: ModelConfig, ranks: int, page: int, budget: int, sequences: int
) -> None:
    """In float64, so that no two words of the tiny model are close enough for rounding to choose between them.

    The second prompt has 9 of 16 tokens and ends at the context, after 7. With LongRoPE the others outgrow 6 tokens on
    the way, and their keys are computed anew.
    """
    expected = naive(config)
    assert len(expected[1][0]) == 7
    given = ThreadGroup.run(ranks, lambda group: continued(group, config, page, budget, sequences))
    assert given == [expected] * ranks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pages_are_of_the_type_that_is_told_beforehand(shape: dict[str, object], dtype: str) -> None:
    """`check` counts their bytes from the config alone; the compiled step keeps float32 beside bfloat16 weights."""
    config = tiny_config(dtype=dtype, **shape)
    engine = Engine(Decoder(config, SingleGroup()).to(getattr(torch, dtype)))
    assert {kv.k.dtype for kv in engine.kv} == {getattr(torch, kv_dtype(config))}


POISON = 12
"""A word whose embedding is no number: a text in which it stands has no next word, and no other text may notice."""


def texts(group: Group, config: ModelConfig, prompts: list[list[int]], temperature: float) -> list[list[int]]:
    model = Decoder(config, group)
    start, stop = model.cuts.vocabulary.range(group.rank)
    if start <= POISON < stop:
        model.embedding.weight.data[POISON - start] = torch.nan
    engine = Engine(model, Scheduler(config.context, 4))
    params = SamplingParams(max_tokens=8, temperature=temperature, top_k=20 if temperature else 0)
    for number, prompt in enumerate(prompts):
        engine.add(Request(number=number, tokens=tuple(prompt), params=params))
    found: list[list[int]] = [[] for _ in prompts]
    while engine.busy:
        for new in engine.step():
            assert (new.finish == "nan") == (new.token == NO_TOKEN)
            found[new.number].append(new.token)
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_text_without_numbers_ends_alone(ranks: int, temperature: float) -> None:
    """By the compiled step at one rank, by torch at three; the other texts are the same as without it, bit for bit."""
    config = tiny_config(context=16)
    others, poisoned = [PROMPTS[0], PROMPTS[3]], [PROMPTS[0], [2, POISON, 5], PROMPTS[3]]

    def run(prompts: list[list[int]]) -> list[list[list[int]]]:
        if ranks == 1:
            return [texts(SingleGroup(), config, prompts, temperature)]
        return ThreadGroup.run(ranks, lambda group: texts(group, config, prompts, temperature))

    first, second = run(others)[0]
    assert all(found == [first, [NO_TOKEN], second] for found in run(poisoned))
    assert len(first) == len(second) == 8, "of other texts the poisoned word is no part"
