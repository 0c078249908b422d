"""Models of transformers against their unsharded twins: outputs, communication, three optimiser steps."""

import pytest
from tests.parallelize.twins import compare
from tests.parallelize.zoo import ZOO, ZOO_UNEVEN, build

INSIDE = {"qwen3": 1e-6, "mixtral": 1e-5}
"""Norms that these compute in float32 whatever the model's type see sums of another order; elsewhere all is float64."""


@pytest.mark.parametrize("name", ZOO)
def test_three_ranks_against_the_twin(name: str) -> None:
    """The reference is the model itself. float64, so that only the order of sums differs: 1e-9 after three steps."""
    model, inputs = build(name)
    plan = compare(model, inputs, 3, INSIDE.get(name, 1e-8))
    assert plan.runs == "modules"
    assert plan.cuts


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2, 4, 5])
@pytest.mark.parametrize("name", ZOO)
def test_any_number_of_ranks(name: str, ranks: int) -> None:
    model, inputs = build(name)
    compare(model, inputs, ranks, INSIDE.get(name, 1e-8))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon"])
def test_more_ranks_than_heads_leave_nobody_out_of_a_collective(name: str) -> None:
    """Six heads on seven ranks. Where a model's own reshapes cannot be of nothing, its traced graph runs."""
    model, inputs = build(name)
    plan = compare(model, inputs, 7, 1e-8)
    assert (plan.runs == "modules") == (name in ("llama", "falcon"))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ZOO_UNEVEN)
def test_query_heads_that_cover_no_whole_group_read_their_kv_heads_by_index(name: str, ranks: int) -> None:
    """Through transformers' attention interface: no KV head is held twice on a rank."""
    model, inputs = build(name)
    plan = compare(model, inputs, ranks, 1e-8)
    index = ((0, 0, 0, 1, 1), (0, 1, 1, 1))
    assert list(plan.indexed.values()) == ([index, index] if ranks == 2 else [])
    assert all(len(set(mine)) == len(mine) for cut in plan.cuts for mine in cut.ranges)
