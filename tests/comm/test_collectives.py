"""Every collective of `ThreadGroup` and `SingleGroup` against a plain loop over the ranks: the same bits, always.

Sums are in rank order by definition, so the reference adds in that order and nothing here needs a tolerance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwright.comm.group import Group
from shardwright.comm.single import SingleGroup
from shardwright.testing.ranks import on_threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64, torch.uint8]
LAYOUTS = ["plain", "transposed", "strided", "expanded"]


def part(seed: int, rank: int, shape: list[int], dtype: torch.dtype, layout: str) -> Tensor:
    """Rank `rank`'s input: values of very different sizes, so that another order of summation shows in the bits."""
    draw = torch.Generator().manual_seed(1000 * seed + rank)

    def values(shape: list[int]) -> Tensor:
        wide = torch.randn(shape, generator=draw, dtype=torch.float64) * 10.0 ** (rank % 4)
        return wide.to(dtype) if dtype.is_floating_point else (wide * 50).long().to(dtype)

    if layout == "transposed":
        return values(shape[::-1]).permute(*range(len(shape) - 1, -1, -1))
    if layout == "strided":
        return values([*shape, 2])[..., 1]
    if layout == "expanded" and shape:
        return values([1, *shape[1:]]).expand(shape)
    return values(shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also of -0.0 and of NaN, which `torch.equal` does not tell apart or does not find equal."""
    raw = [torch.empty(x.numel(), dtype=x.dtype).copy_(x.reshape(-1)).view(torch.uint8) for x in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*raw)


def sum_by_loop(parts: list[Tensor]) -> Tensor:
    """First to last; halves in float32, rounded once."""
    wide = torch.float32 if parts[0].dtype in (torch.bfloat16, torch.float16) else parts[0].dtype
    total = parts[0].to(wide)
    for x in parts[1:]:
        total = total + x.to(wide)
    return total.to(parts[0].dtype)


@dataclass(frozen=True)
class Case:
    """One set of inputs; `sizes` are the widths of all ranks along `dim`, whose sum is the whole's."""

    ranks: int
    seed: int
    shape: list[int]
    dtype: torch.dtype
    layout: str
    dim: int
    sizes: list[int]

    def widened(self, width: int) -> list[int]:
        dim = self.dim % len(self.shape)
        return [*self.shape[:dim], width, *self.shape[dim + 1 :]]

    def inputs(self, shapes: list[list[int]]) -> list[Tensor]:
        return [part(self.seed, rank, shape, self.dtype, self.layout) for rank, shape in enumerate(shapes)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ranks = draw(st.integers(1, 8))
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    return Case(
        ranks,
        draw(st.integers(0, 1000)),
        shape,
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.integers(-len(shape), len(shape) - 1)),
        draw(st.lists(st.integers(0, 3), min_size=ranks, max_size=ranks)),
    )


def checked(
    case: Case, shapes: list[list[int]], expected: list[Tensor], call: Callable[[Group, Tensor], Tensor]
) -> None:
    """Run `call` on all ranks, twice: the expected bits both times, new memory, and inputs as they were."""
    inputs = case.inputs(shapes)
    untouched = [x.clone() for x in inputs]
    for _ in range(2):
        results = on_threads(case.ranks, lambda group: call(group, inputs[group.rank]))
        for rank, result in enumerate(results):
            assert same_bits(result, expected[rank]), f"rank {rank}: {result} is not {expected[rank]}"
            assert same_bits(inputs[rank], untouched[rank])
            storages = {x.untyped_storage().data_ptr() for x in inputs if x.numel()}
            assert not result.numel() or result.untyped_storage().data_ptr() not in storages


@given(cases())
@settings(deadline=None, max_examples=150)
def test_all_reduce(case: Case) -> None:
    shapes = [case.shape] * case.ranks
    total = sum_by_loop(case.inputs(shapes))
    checked(case, shapes, [total] * case.ranks, lambda group, x: group.all_reduce(x))


@given(cases())
@settings(deadline=None, max_examples=150)
def test_all_gather(case: Case) -> None:
    shapes = [case.widened(width) for width in case.sizes]
    whole = torch.cat(case.inputs(shapes), case.dim)
    checked(case, shapes, [whole] * case.ranks, lambda group, x: group.all_gather(x, case.dim, case.sizes))


@given(cases())
@settings(deadline=None, max_examples=150)
def test_reduce_scatter(case: Case) -> None:
    shapes = [case.widened(sum(case.sizes))] * case.ranks
    expected = sum_by_loop(case.inputs(shapes)).split(case.sizes, case.dim)
    checked(case, shapes, list(expected), lambda group, x: group.reduce_scatter(x, case.dim, case.sizes))


@given(cases(), st.data())
@settings(deadline=None, max_examples=100)
def test_all_to_all(case: Case, data: st.DataObject) -> None:
    row = st.lists(st.integers(0, 2), min_size=case.ranks, max_size=case.ranks)
    table = data.draw(st.lists(row, min_size=case.ranks, max_size=case.ranks))
    shapes = [[sum(row), *case.shape[1:]] for row in table]
    dealt = [x.split(row) for x, row in zip(case.inputs(shapes), table, strict=True)]
    expected = [torch.cat([rows[rank] for rows in dealt]) for rank in range(case.ranks)]
    columns = [[row[rank] for row in table] for rank in range(case.ranks)]
    checked(case, shapes, expected, lambda group, x: group.all_to_all(x, table[group.rank], columns[group.rank]))


@given(cases(), st.integers(0, 7))
@settings(deadline=None, max_examples=60)
def test_broadcast(case: Case, root: int) -> None:
    root %= case.ranks
    shapes = [case.shape] * case.ranks
    checked(case, shapes, [case.inputs(shapes)[root]] * case.ranks, lambda group, x: group.broadcast(x, root))


@given(cases())
@settings(deadline=None, max_examples=60)
def test_send_and_recv_around_a_ring(case: Case) -> None:
    """Each rank hands its tensor, of its own shape, to the next; at size 1 nobody is there."""
    shapes = [case.widened(width) for width in case.sizes]
    if case.ranks == 1:
        return

    def shift(group: Group, x: Tensor) -> Tensor:
        before = (group.rank - 1) % group.size
        group.send(x, (group.rank + 1) % group.size, tag="ring")
        return group.recv(shapes[before], case.dtype, before, tag="ring")

    inputs = case.inputs(shapes)
    checked(case, shapes, [inputs[rank - 1] for rank in range(case.ranks)], shift)


def check_out(group: Group, dtype_name: str) -> None:
    """`out=` receives the sum and is what comes back: another tensor, one that is not contiguous, `x` itself."""
    dtype = getattr(torch, dtype_name)
    parts = [part(7, rank, [3, 4], dtype, "plain") for rank in range(group.size)]
    expected, x = sum_by_loop(parts), parts[group.rank].clone()
    for out in (torch.empty(3, 4, dtype=dtype), torch.empty(4, 3, dtype=dtype).T):
        assert group.all_reduce(x, out=out) is out
        assert same_bits(out, expected)
        assert same_bits(x, parts[group.rank])
    handle = group.all_reduce_async(x, out=x)
    assert handle.wait() is x
    assert same_bits(x, expected)


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_out_receives_the_sum(ranks: int, dtype: str) -> None:
    on_threads(ranks, check_out, dtype)
    if ranks == 1:
        check_out(SingleGroup(), dtype)


def check_parameter(group: Group) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    assert group.all_reduce(weight, out=weight) is weight
    assert weight.tolist() == [group.size] * 3
    assert weight.is_leaf
    for result in (
        group.all_reduce(weight),
        group.broadcast(weight, 0),
        group.all_gather(weight, 0, [3] * group.size),
        group.reduce_scatter(weight, 0, [3] + [0] * (group.size - 1)),
    ):
        assert not result.requires_grad


def test_a_parameter_is_a_tensor_like_any_other() -> None:
    """Nothing in a group is differentiable: results carry no graph, and a parameter may be the target of a sum."""
    on_threads(3, check_parameter)
    check_parameter(SingleGroup())


def check_rank_order(group: Group) -> float:
    """1e8 + 1 - 1e8 + 1 in float32 is 1 from first to last, 0 or 2 in other orders."""
    return group.all_reduce(torch.tensor([1e8, 1.0, -1e8, 1.0][group.rank])).item()


def test_sums_go_from_the_first_rank_to_the_last() -> None:
    assert on_threads(4, check_rank_order) == [1.0] * 4


def check_halves(group: Group) -> float:
    """256 + 1 is lost in bfloat16 and kept in float32; 258 is the nearest bfloat16 to the sum, once."""
    return group.all_reduce(torch.tensor([256.0, 1.0, 1.0][group.rank], dtype=torch.bfloat16)).item()


def test_halves_are_summed_in_float32_and_rounded_once() -> None:
    assert on_threads(3, check_halves) == [258.0] * 3


@given(cases())
@settings(deadline=None, max_examples=50)
def test_a_group_of_one_is_a_group(case: Case) -> None:
    """`SingleGroup` against a thread group of one."""
    alone, x = SingleGroup(), part(case.seed, 0, case.shape, case.dtype, case.layout)
    width = [x.shape[case.dim]]
    calls: list[Callable[[Group], Any]] = [
        lambda group: group.all_reduce(x),
        lambda group: group.all_gather(x, case.dim, width),
        lambda group: group.reduce_scatter(x, case.dim, width),
        lambda group: group.all_to_all(x, [len(x)], [len(x)]),
        lambda group: group.broadcast(x, 0),
        lambda group: group.split([0]).all_reduce(x),
    ]
    for call in calls:
        mine = call(alone)
        assert same_bits(mine, on_threads(1, call)[0])
        assert not x.numel() or mine.data_ptr() != x.data_ptr()
    assert alone.barrier() is None
    alone.end_step()
