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
