"""Regions: gradients against an unsharded reference, each move's conjugate, and what moves: one collective a side.

All in float64, where another order of summation differs by 1e-15 of values around 1 and anything wrong by far more
than 1e-12.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwright.comm import regions
from shardwright.comm.group import Group
from shardwright.comm.planned import PlannedGroup
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.single import SingleGroup
from shardwright.errors import UnsupportedError, UsageError
from shardwright.layout.partition import Partition
from shardwright.testing.ranks import on_threads

close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)
Region = Callable[[Tensor, Group], Tensor]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_mlp(group: Group, features: Partition) -> None:
    """Column-parallel, tanh, row-parallel: loss and all gradients against two whole matrices."""
    up, down, x = drawn(features.size, 3, seed=1), drawn(4, features.size, seed=2), drawn(5, 3)
    whole = [t.clone().requires_grad_() for t in (x, up, down)]
    reference = (whole[0] @ whole[1].T).tanh() @ whole[2].T
    reference.square().sum().backward()

    start, stop = features.range(group.rank)
    mine = [t.clone().requires_grad_() for t in (x, up[start:stop], down[:, start:stop])]
    hidden = (regions.copy(mine[0], group, "x") @ mine[1].T).tanh()
    y = regions.reduce(hidden @ mine[2].T, group, "y")
    y.square().sum().backward()
    close(y, reference)
    close(mine[0].grad, whole[0].grad)
    close(mine[1].grad, whole[1].grad[start:stop])
    close(mine[2].grad, whole[2].grad[:, start:stop])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6))
@settings(deadline=None, max_examples=40)
def test_copy_and_reduce_around_a_sharded_mlp(widths: list[int]) -> None:
    """Uneven and empty shares; a rank with no features takes part in both collectives."""
    on_threads(len(widths), check_mlp, Partition.explicit(widths))


def check_scatter_and_gather(group: Group, cut: Partition, dim: int) -> None:
    """Each rank works on its share of `x` and all use the joined result, with a weight that differs by place."""
    shape = [3, 4]
    shape[dim] = cut.size
    x, weight = drawn(*shape), drawn(*shape, seed=1)
    whole = x.clone().requires_grad_()
    (whole.tanh() * weight).sin().sum().backward()

    mine = x.clone().requires_grad_()
    share = regions.scatter(mine, dim, cut.widths, group, "s").tanh()
    assert share.shape[dim] == cut.widths[group.rank]
    joined = regions.gather(share, dim, cut.widths, group, "g")
    (joined * weight).sin().sum().backward()
    close(joined, x.tanh())
    close(mine.grad, whole.grad)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.sampled_from([0, 1, -1, -2]))
@settings(deadline=None, max_examples=40)
def test_scatter_and_gather_around_a_sharded_function(widths: list[int], dim: int) -> None:
    on_threads(len(widths), check_scatter_and_gather, Partition.explicit(widths), dim)


SIZES = [2, 0, 3]


def moves(name: str, x: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """A region's forward on `x`, and its backward on a gradient drawn for this rank."""
    x = x.clone().requires_grad_()
    calls: dict[str, Region] = {
        "copy": regions.copy,
        "reduce": regions.reduce,
        "scatter": lambda x, group: regions.scatter(x, 0, SIZES, group),
        "gather": lambda x, group: regions.gather(x, 0, SIZES, group),
    }
    y = calls[name](x, group)
    y.backward(drawn(*y.shape, seed=group.rank))
    assert x.grad is not None
    return y.detach(), x.grad


def check_conjugate(group: Group, name: str, conjugate: str) -> None:
    """The backward of one is the forward of the other on the same tensor: the same bits."""
    shares = {"gather"}
    height = SIZES[group.rank] if name in shares else 5
    y, gradient = moves(name, drawn(height, 2, seed=10 + group.rank), group)
    forward, _ = moves(conjugate, drawn(*y.shape, seed=group.rank), group)
    assert torch.equal(gradient, forward)


@pytest.mark.parametrize(
    ("name", "conjugate"), [("copy", "reduce"), ("reduce", "copy"), ("scatter", "gather"), ("gather", "scatter")]
)
def test_backward_is_the_conjugates_forward(name: str, conjugate: str) -> None:
    on_threads(3, check_conjugate, name, conjugate)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("copy", [("all_reduce", "t/grad", 80)]),
        ("reduce", [("all_reduce", "t", 80)]),
        ("scatter", [("all_gather", "t/grad", 48)]),
        ("gather", [("all_gather", "t", 48)]),
    ],
)
def test_each_region_moves_its_tensor_once(name: str, expected: list[tuple[str, str, int]]) -> None:
    """Forward and backward together, on rank 2 of widths 2, 0, 3: 5 x 2 or 3 x 2 elements of 8 bytes."""
    group = RecordingGroup(PlannedGroup(2, 3))
    x = torch.empty(3 if name == "gather" else 5, 2, dtype=torch.float64, device="meta", requires_grad=True)
    arguments = (0, SIZES, group, "t") if name in ("scatter", "gather") else (group, "t")
    getattr(regions, name)(x, *arguments).sum().backward()
    assert [(call.op, call.tag, call.bytes) for call in group.calls] == expected


def check_expanded_gradient(group: Group) -> None:
    """`sum().backward()` hands over a gradient of stride 0, on one rank scaled: the sum of all is 1 + 2 + … + R."""
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    (regions.copy(x, group).sum() * (group.rank + 1)).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[group.size * (group.size + 1) / 2] * 3] * 2


def test_gradients_that_are_not_contiguous() -> None:
    on_threads(3, check_expanded_gradient)


def check_inputs(group: Group) -> None:
    """Inputs keep their values, and what needs no gradient moves nothing backward."""
    recorder = RecordingGroup(group)
    x = drawn(5, 2)
    before = x.clone()
    results = [
        regions.copy(x, recorder),
        regions.reduce(x, recorder),
        regions.scatter(x, 0, SIZES, recorder),
        regions.gather(x[: SIZES[group.rank]], 0, SIZES, recorder),
    ]
    assert torch.equal(x, before)
    assert not any(y.requires_grad for y in results)
    assert [call.op for call in recorder.calls] == ["all_reduce", "all_gather"]


def test_without_gradients_only_forward_moves_happen() -> None:
    on_threads(3, check_inputs)


def test_a_group_of_one_moves_nothing_and_changes_nothing() -> None:
    x = drawn(5, 2).requires_grad_()
    group = SingleGroup()
    y = regions.gather(regions.scatter(regions.reduce(regions.copy(x, group), group), 0, [5], group), 0, [5], group)
    y.square().sum().backward()
    close(y, x)
    close(x.grad, 2 * x)


@pytest.mark.parametrize(
    ("dim", "sizes", "message"),
    [
        (0, [2, 2], r"x=float64 \[5, 2\]: the shares along dim 0 sum to 4; pass the whole tensor"),
        (2, [2, 3], r"dim=2: x is float64 \[5, 2\]; use 0…1"),
        (0, [5], r"sizes=\[5\]: one width, not negative, for each of 2 ranks"),
        (0, [6, -1], r"sizes=\[6, -1\]: one width, not negative"),
    ],
)
def test_a_scatter_that_would_lose_something_is_refused(dim: int, sizes: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        regions.scatter(drawn(5, 2), dim, sizes, PlannedGroup(0, 2))


def test_a_second_derivative_is_refused() -> None:
    """Nothing here knows how to differentiate a backward collective; better an error than a gradient of zero."""
    x = drawn(3).requires_grad_()
    y = regions.copy(x, SingleGroup()).pow(3).sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def check_summed_gradients(group: Group) -> None:
    """Rank r's loss is r + 1 times a sum: every rank's gradient is that of all losses. `y` may be changed in place."""
    x = drawn(3, seed=2).requires_grad_()
    recorder = RecordingGroup(group)
    y = regions.sum_gradients(x * 2, recorder, "y")
    y.add_(1)
    close(y, x.detach() * 2 + 1)
    (y.square() * (group.rank + 1)).sum().backward()
    close(x.grad, 4 * (x.detach() * 2 + 1) * sum(range(1, group.size + 1)))
    assert [(call.op, call.tag) for call in recorder.calls] == [("all_reduce", "y/grad")]
    with pytest.raises(UnsupportedError, match="y: a gradient summed over ranks has no gradient of its own"):
        torch.autograd.grad(regions.sum_gradients(x * x, group, "y").sum() * x.sum(), x, create_graph=True)
    constant = drawn(3)
    assert regions.sum_gradients(constant, recorder) is constant


@pytest.mark.parametrize("size", [1, 3])
def test_sum_gradients(size: int) -> None:
    on_threads(size, check_summed_gradients)
