"""Modules that are nobody's against their twins: fused projections, interleaved parts, branches, shared weights."""

import pytest
from tests.parallelize.foreign import FOREIGN, build
from tests.parallelize.twins import compare

OWN_FORWARD = {"attention", "mixer", "branching", "twice", "chained"}
"""The others multiply inside a module that does more, or end in a convolution: their traced graph runs."""


@pytest.mark.parametrize("name", FOREIGN)
def test_four_ranks_against_the_twin(name: str) -> None:
    """float64: after three steps only the order of sums differs."""
    module, inputs = build(name)
    plan = compare(module, inputs, 4)
    assert (plan.runs == "modules") == (name in OWN_FORWARD), plan
    assert bool(plan.cuts) == (name != "chained"), plan


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("name", FOREIGN)
def test_any_number_of_ranks(name: str, ranks: int) -> None:
    module, inputs = build(name)
    compare(module, inputs, ranks)
