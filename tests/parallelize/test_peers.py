"""Our plan beside the one written by hand in transformers: the same or fewer bytes, for each model that has one."""

import re
from math import prod
from typing import Any

import pytest
from tests.parallelize.zoo import build

from shardwright.parallelize.model import make_plan
from shardwright.parallelize.trace import Trace, owner, trace

WITH_A_PLAN = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "mixtral")
TABLE = dict.fromkeys(WITH_A_PLAN, (48944, 48944)) | {
    "gemma": (43008, 48944),
    "phi3": (48944, 86576),
    "mixtral": (13720, 24472),
}
"""Bytes of both, as docs/parallelize.md has them."""

REDUCED = ("rowwise", "rowwise_split_input", "moe_tp_experts")
GATHERED = ("colwise_gather_output",)


def their_bytes(model: Any, traced: Trace) -> int:
    """What all ranks together hand over in a forward: a sum as often as ranks, a gathered output once; over 2 ranks."""
    styles = {f"model.{pattern}": style for pattern, style in model.config.base_model_tp_plan.items()}
    styles |= type(model)._tp_plan
    total = 0
    last = {owner(node): node for node in traced.graph.graph.nodes if node.op == "call_function"}
    for path, node in last.items():
        found = [style for pattern, style in styles.items() if re.fullmatch(pattern.replace("*", "[0-9]+"), path)]
        style = found[0] if found else ""
        size = prod(node.meta["val"].shape) * node.meta["val"].element_size()
        total += size * (2 if style in REDUCED else 1 if style in GATHERED else 0)
    return total


@pytest.mark.parametrize("name", WITH_A_PLAN)
def test_never_more_than_the_plan_written_by_hand(name: str) -> None:
    model, inputs = build(name)
    traced = trace(model, inputs)
    plan = make_plan(model, traced, 2)
    ours, theirs = sum(plan.bytes_per_forward(rank) for rank in range(2)), their_bytes(model, traced)
    assert 0 < ours <= theirs, (ours, theirs)
    assert (ours, theirs) == TABLE[name]
