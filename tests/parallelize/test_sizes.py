"""A traced graph at other sizes than the example's, in either mode, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.parallelize import foreign, zoo
from tests.parallelize.twins import call
from torch import Tensor, nn

from shardwright.comm.group import Group
from shardwright.comm.single import SingleGroup
from shardwright.errors import UsageError
from shardwright.parallelize.model import make_plan, parallelize_model
from shardwright.parallelize.sharding import full_state_dict, sharding_of
from shardwright.parallelize.trace import trace
from shardwright.testing.ranks import on_threads


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


OTHERS: dict[str, Callable[[], list[tuple[Tensor, ...]]]] = {
    "encoder": lambda: [(normal(3, 5, 24),), (normal(1, 9, 24),), (normal(4, 1, 24),)],
    "decoder": lambda: [(normal(9, 5, 24), normal(4, 5, 24)), (normal(1, 5, 24), normal(6, 5, 24))],
    "interleaved": lambda: [(normal(3, 5, 12),), (normal(1, 1, 12),)],
}
"""For each module whose traced graph runs, inputs of other batch sizes and lengths, in turn."""


@pytest.mark.parametrize("name", OTHERS)
def test_a_traced_graph_trains_and_runs_at_other_lengths(name: str) -> None:
    """Traced once; each step has other sizes. float64: only the order of sums differs."""
    module, example = foreign.build(name)
    if name == "decoder":  # a memory of one token would be one for good
        example = (example[0], normal(3, 7, 24))
    traced = trace(module, example)
    inputs = OTHERS[name]()
    before = {k: v.clone() for k, v in module.state_dict().items()}

    def train(part: nn.Module) -> list[Tensor]:
        optimizer, outputs = torch.optim.SGD(part.parameters(), lr=0.1), []
        for given in inputs:
            optimizer.zero_grad()
            y = call(part.train(), given)
            (y * torch.arange(y.numel(), dtype=y.dtype).sin().view_as(y)).sum().backward()
            optimizer.step()
            outputs.append(call(part.eval(), given).detach())
        return outputs

    def body(group: Group) -> tuple[list[Tensor], dict[str, Tensor]]:
        part = parallelize_model(module, group, traced)
        return train(part), full_state_dict(part)

    parts = on_threads(3, body)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    expected = train(module)
    for outputs, state in parts:
        torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state, dict(module.state_dict()), rtol=1e-10, atol=1e-10)


def test_gpt2_on_more_ranks_than_heads_runs_at_other_lengths() -> None:
    model, inputs = zoo.build("gpt2")
    traced, other = trace(model, inputs), {"input_ids": torch.randint(3, 50, (3, 11))}
    expected = call(model, other)
    for output in on_threads(7, lambda group: call(parallelize_model(model, group, traced), other)):
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


def graph_of(*modules: nn.Module) -> nn.Module:
    """A split model that runs the graph: it ends in a convolution."""
    torch.manual_seed(5)
    model = nn.Sequential(*modules, foreign.Interleaved()).double()
    part = parallelize_model(model, SingleGroup(), (normal(2, 7, 12),))
    assert sharding_of(part).plan.runs != "modules"
    return part


def test_a_size_the_model_holds_is_refused_at_the_call() -> None:
    """The mixer multiplies over its 7 tokens: the batch is free, the length is not, and the plan says both."""
    part = graph_of(foreign.Mixer())
    assert part(normal(5, 7, 12)).shape == (5, 7, 12)
    assert "the graph takes input [a, 7, 12]" in str(sharding_of(part).plan)
    with pytest.raises(
        UsageError, match=r"input=\[2, 9, 12\]: dim 1 was 7 when the model was traced, .*; pass example"
    ):
        part(normal(2, 9, 12))
    with pytest.raises(UsageError, match=r"input=\[2, 12\]: it had 3 dims when the model was traced"):
        part(normal(2, 12))


def test_a_branch_by_size_is_refused_beyond_it() -> None:
    part = graph_of(foreign.Branching())
    assert part(normal(2, 4, 12)).shape == (2, 4, 12)
    with pytest.raises(UsageError, match=r"the traced graph is for input.size\(\)\[1\] >= 4"):
        part(normal(2, 3, 12))


def test_a_branch_at_one_is_refused_there() -> None:
    """Tracing with symbols never asks about 1; that the graph for 1 is another one is found by tracing that."""

    class Lone(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[0] == 1 else x * 3

    part = graph_of(Lone())
    assert part(normal(6, 1, 12)).shape == (6, 1, 12)
    with pytest.raises(UsageError, match="sizes of 1 where the example had more"):
        part(normal(1, 7, 12))


def test_inputs_of_another_kind_are_refused_by_name() -> None:
    module, (x,) = foreign.build("encoder")
    part = parallelize_model(module, SingleGroup(), (x,))
    assert torch.equal(part(src=x, mask=None), part(x))
    with pytest.raises(UsageError, match=r"mask=\[7, 7\]: it was None when the model was traced"):
        part(x, mask=normal(7, 7))
    masked = parallelize_model(module, SingleGroup(), {"src": x, "mask": normal(7, 7), "is_causal": False})
    with pytest.raises(UsageError, match="mask=None: it was a tensor when the model was traced"):
        masked(x)


def test_a_graph_runs_in_both_modes() -> None:
    """Batch norm keeps its averages in training, and uses them after; the graph has a program for each."""
    torch.manual_seed(6)
    model = nn.Sequential(nn.Conv1d(6, 9, 1), nn.ReLU(), nn.Conv1d(9, 6, 1), nn.BatchNorm1d(6)).double()
    x = normal(4, 6, 5)
    traced = trace(model, (x,))

    def both(part: Any) -> list[Tensor]:
        return [part.train()(x), part.eval()(x), part.eval()(2 * x[:3])]

    parts = on_threads(3, lambda group: both(parallelize_model(model, group, traced)))
    expected = both(model)
    for outputs in parts:
        torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)


def test_a_place_picked_by_number_that_a_rank_lacks_leaves_the_chain_whole() -> None:
    class Picking(foreign.Attention):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 24)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).view(*x.shape[:2], self.n, 4)
            return self.o(q.softmax(-1).flatten(2)).softmax(-1) + self.first(q[:, :, [0]].flatten(2)).softmax(-1)

    x = normal(2, 7, 24)
    plan = make_plan(Picking().double(), trace(Picking().double(), (x,)), 2)
    assert plan.whole["q.weight"] == "index picks place 0 of 6, which rank 1 would not find"
