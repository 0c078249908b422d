"""Modules that are nobody's against their twins: fused projections, interleaved parts, branches, shared weights."""

import pytest
from tests.parallelize.foreign import FOREIGN, build
from tests.parallelize.twins import compare

OWN_FORWARD = {"attention", "uneven", "mixer", "branching", "twice", "chained", "telling", "headed"}
"""The others multiply inside a module that does more, or end in a convolution: their traced graph runs."""


@pytest.mark.parametrize("name", FOREIGN)
def test_four_ranks_against_the_twin(name: str) -> None:
    """float64: after three steps only the order of sums differs."""
    module, inputs = build(name)
    plan = compare(module, inputs, 4)
    assert (plan.runs == "modules") == (name in OWN_FORWARD), plan
    assert bool(plan.cuts) == (name != "chained"), plan


def test_a_foreign_attention_holds_a_kv_head_once_for_each_query_head_that_needs_it() -> None:
    """Two ranks have 5 and 4 of 9 query heads over 3 KV heads, neither whole groups; the plan states the bytes."""
    module, inputs = build("uneven")
    plan = compare(module, inputs, 2)
    rows = next(cut for cut in plan.cuts if cut.parameter == "kv.weight").ranges
    assert rows == (((0, 8), (0, 8), (0, 16), (8, 16)), ((8, 24), (16, 24), (16, 24)))
    assert f"copies  {(9 - 3) * 8 * 25 * 8:,} bytes" in str(plan)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("name", FOREIGN)
def test_any_number_of_ranks(name: str, ranks: int) -> None:
    module, inputs = build(name)
    compare(module, inputs, ranks)
