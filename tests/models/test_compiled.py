"""One description, two executions: the compiled decode step against the torch path, for every family."""

from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch

from shardwright.comm.group import Group
from shardwright.comm.segment import SLOT
from shardwright.comm.single import SingleGroup
from shardwright.layers.batch import Batch
from shardwright.layers.kv import PagedKV
from shardwright.models.compiled import CompiledStep
from shardwright.models.decoder import Decoder
from shardwright.models.execution import obstacle
from shardwright.models.rope import DynamicScaling, YarnScaling
from shardwright.testing.models import tiny_config
from shardwright.testing.ranks import Processes, on_processes

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tied": True},
    "qwen3": {"family": "qwen3", "qk_norm": True},
    "windows": {"family": "mistral", "windows": (3, 0)},
    "partly turned": {"rotary_size": 2},
    "yarn": {"rope_scaling": YarnScaling(factor=4.0, original=8, attention=1.2), "rope_theta": 30.0},
    "biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
}
PAGE = 4
HELD = (9, 3, 14)
"""Tokens of three sequences before the step under test: several pages, one page, and one about to begin another."""


def prefilled(model: Decoder) -> tuple[list[PagedKV], tuple[tuple[int, ...], ...]]:
    """Pages filled by the torch path with the past of all sequences; tables are interleaved."""
    config, heads = model.config, model.cuts.heads.kv_width(model.group.rank)
    kv = [PagedKV(PAGE, heads, config.head_size, torch.float32, pages=12) for _ in range(config.layers)]
    tables = ((0, 3, 5), (1,), (2, 4, 6, 8))
    tokens = torch.arange(sum(HELD)) % config.vocabulary
    positions = torch.cat([torch.arange(held) for held in HELD])
    model(Batch(tokens, positions, HELD, HELD, tables), kv)
    return kv, tables


def check_steps(group: Group, changes: dict[str, Any], dtype: str) -> None:
    """Two steps, against the torch path in float32 over the same weights, rounded to `dtype` where that is narrower.

    2e-5 relative: float32 sums of at most 24 terms in another order, through two layers. It holds for bfloat16 weights
    too, since the compiled step widens them and rounds no activation, where the torch path would.
    """
    model = Decoder(tiny_config(**changes), group).to(getattr(torch, dtype))
    for parameter in model.parameters():
        parameter.data.mul_(5)  # far from zero, so that a wrong bias or norm shows
    twin = deepcopy(model).float()
    with torch.inference_mode():
        (ours, tables), (theirs, _) = prefilled(twin), prefilled(twin)
        compiled = CompiledStep(model, ours)
        for step in range(2):
            held = tuple(n + step + 1 for n in HELD)
            batch = Batch(torch.tensor([5, 1, 7]), torch.tensor(held) - 1, (1, 1, 1), held, tables)
            tables = (tables[0], (1, 7), tables[2])  # the second sequence's page is full after one more token
            (logits, found), expected = compiled([5, 1, 7], held, tables), twin(batch, theirs)
            # exact: both take the lowest of the largest of the same float32 values
            whole = group.all_gather(logits, 1, model.cuts.vocabulary.widths)
            assert found == whole.argmax(-1, keepdim=True).tolist()
            if expected.numel():
                assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()
    group.end_step()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_one_rank_equals_the_torch_path(changes: dict[str, Any], dtype: str) -> None:
    check_steps(SingleGroup(), changes, dtype)


def check_every_variant(group: Group) -> None:
    for changes in VARIANTS.values():
        for dtype in ("float32", "bfloat16"):
            check_steps(group, changes, dtype)


def check_several_at_once(group: Group) -> None:
    """Tokens of one call equal those of as many calls, exactly: it is the same arithmetic in the same order. A stop,
    the given number or a text without numbers ends the call for all, on every rank behind the same token.
    """
    model = Decoder(tiny_config(), group)
    for parameter in model.parameters():
        parameter.data.mul_(5)
    with torch.inference_mode():
        (kv, tables), (theirs, _) = prefilled(model), prefilled(model)
        compiled, alone = CompiledStep(model, kv), CompiledStep(model, theirs)
        tables, held, newest = (tables[0], (1, 7), tables[2]), [n + 1 for n in HELD], [5, 1, 7]
        by_one = []
        for step in range(2):
            logits, found = alone(newest, [n + step for n in held], tables)
            newest = [tokens[-1] for tokens in found]
            by_one.append(newest)
        last, together = compiled([5, 1, 7], held, tables, most=2)
        assert together == [list(tokens) for tokens in zip(*by_one, strict=True)]
        assert torch.equal(last, logits)
        stop = by_one[0][1]
        assert compiled([5, 1, 7], held, tables, most=2, stops={stop})[1] == [[token] for token in by_one[0]]
        start, end = model.cuts.vocabulary.range(group.rank)
        model.embedding.weight.data[max(9 - start, 0) : max(min(10, end) - start, 0)] = torch.nan  # the word 9
        assert compiled([9, 1, 7], held, tables, most=2)[1] == [[-1], *([token] for token in by_one[0][1:])]
        with patch("shardwright.models.compiled.PIECE", 0):  # no time is left behind the first
            assert compiled([5, 1, 7], held, tables, most=2)[1] == [[token] for token in by_one[0]]
    group.end_step()


def test_several_tokens_of_one_call(three_processes: Processes) -> None:
    check_several_at_once(SingleGroup())
    three_processes.run(check_several_at_once)


def check_parts_then_whole(group: Group) -> None:
    check_every_variant(group.split([0, 1] if group.rank < 2 else [2, 3, 4, 5, 6]))
    check_every_variant(group)


def test_three_ranks_of_shared_memory_equal_the_torch_path(three_processes: Processes) -> None:
    three_processes.run(check_every_variant)


def test_other_numbers_of_ranks_equal_the_torch_path() -> None:
    """2 and 5, side by side, then all 7, of which one has no head: it multiplies nothing and is part of every sum."""
    on_processes(7, check_parts_then_whole)


LACKING: dict[str, dict[str, Any]] = {
    "LayerNorm": {"norm": "layer"},
    "norms by 1 + weight": {"norm": "rms_plus_one"},
    "norms behind attention and MLP": {"block": "sandwich"},
    "attention and MLP side by side": {"block": "parallel_shared"},
    "MLP but SwiGLU": {"activation": "gelu"},
    "norms over all heads at once": {"wide_qk_norm": True},
    "a norm for each head": {"own_qk_norm": True},
    "norms rounded once": {"norm": "rms_once"},
    "soft limits": {"logit_cap": 30.0},
    "other scale of scores": {"score_scale": 0.3},
    "scaled embeddings": {"embedding_scale": 3.0},
    "learned positions": {"learned_positions": 64},
    "positions as biases of scores": {"alibi": True},
    "second rotary base": {"windows": (3, 0), "local_rope_theta": 100.0},
    "angles that follow a text's length": {"rope_scaling": DynamicScaling(factor=2.0, context=8)},
}


@pytest.mark.parametrize(("said", "changes"), LACKING.items(), ids=LACKING)
def test_what_it_lacks_is_said(said: str, changes: dict[str, Any]) -> None:
    assert obstacle(Decoder(tiny_config(**changes), SingleGroup())) == f"the compiled step has no {said}"


def test_what_it_does_not_take() -> None:
    """Half types other than bfloat16, more sequences than a slot holds rows."""
    model = Decoder(tiny_config(), SingleGroup())
    assert obstacle(model) is None
    assert obstacle(Decoder(tiny_config(), SingleGroup()).half()) == "float16 weights"
    step = CompiledStep(model, [PagedKV(PAGE, 2, 4, torch.float32, pages=1) for _ in range(2)])
    rows = SLOT // (4 * model.config.hidden)
    assert step.fits(rows)
    assert not step.fits(rows + 1)
