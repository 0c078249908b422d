"""The linears against one unsharded `F.linear`: outputs and all gradients, over cuts that leave ranks empty.

Everything in float64 and to 1e-12: another order of summation is some 1e-15.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwright.comm.group import Call, Group
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.single import SingleGroup
from shardwright.errors import UsageError
from shardwright.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from shardwright.layout.heads import HeadPartition
from shardwright.layout.partition import Partition
from shardwright.testing.ranks import on_threads

IN, TOKENS = 5, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def grad(x: Tensor | None) -> Tensor:
    assert x is not None
    assert x.grad is not None
    return x.grad


@st.composite
def cuts(draw: st.DrawFn, ranks: int | None = None) -> Partition:
    """Up to 6 ranks, any of them empty."""
    ranks = ranks or draw(st.integers(1, 6))
    widths = draw(st.lists(st.integers(0, 4), min_size=ranks, max_size=ranks))
    return Partition.explicit(widths if any(widths) else [*widths[:-1], 1])


class Twin:
    """`y = x @ w.T + b` unsharded, its loss weighing each output differently."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        self.x = random(TOKENS, inputs).requires_grad_()
        self.weight = random(outputs, inputs, seed=1).requires_grad_()
        self.bias = random(outputs, seed=2).requires_grad_() if bias else None
        self.y = F.linear(self.x, self.weight, self.bias)
        self.dy = random(TOKENS, outputs, seed=3)
        self.y.backward(self.dy)


def check_column(group: Group, cut: Partition, bias: bool) -> list[Call]:
    twin, recording = Twin(IN, cut.size, bias=bias), RecordingGroup(group)
    layer = ColumnParallelLinear(IN, cut, recording, bias=bias).double()
    layer.load("weight", twin.weight)
    if twin.bias is not None:
        layer.load("bias", twin.bias)
    rows = slice(*cut.range(group.rank))
    x = twin.x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(twin.dy[:, rows])
    close(y, twin.y[:, rows])
    close(grad(x), grad(twin.x))
    close(grad(layer.weight), grad(twin.weight)[rows])
    if twin.bias is not None:
        close(grad(layer.bias), grad(twin.bias)[rows])
    return recording.calls


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cut=cuts(), bias=st.booleans())
def test_column_parallel(cut: Partition, bias: bool) -> None:
    """One all-reduce, of dx."""
    for calls in on_threads(cut.ranks, check_column, cut, bias):
        assert [(call.op, call.bytes, call.tag) for call in calls] == [("all_reduce", TOKENS * IN * 8, "linear/grad")]


def check_row(group: Group, cut: Partition, bias: bool) -> list[Call]:
    twin, recording = Twin(cut.size, IN, bias=bias), RecordingGroup(group)
    layer = RowParallelLinear(cut, IN, recording, bias=bias).double()
    layer.load("weight", twin.weight)
    if twin.bias is not None:
        layer.load("bias", twin.bias)
    columns = slice(*cut.range(group.rank))
    x = twin.x[:, columns].detach().clone().requires_grad_()
    y = layer(x)
    y.backward(twin.dy)
    close(y, twin.y)
    close(grad(x), grad(twin.x)[:, columns])
    close(grad(layer.weight), grad(twin.weight)[:, columns])
    if twin.bias is not None:
        close(grad(layer.bias), grad(twin.bias))
    return recording.calls


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cut=cuts(), bias=st.booleans())
def test_row_parallel(cut: Partition, bias: bool) -> None:
    """One all-reduce, of y; nothing moves backward."""
    for calls in on_threads(cut.ranks, check_row, cut, bias):
        assert [(call.op, call.bytes, call.tag) for call in calls] == [("all_reduce", TOKENS * IN * 8, "linear")]


def only_bias(group: Group) -> list[float]:
    layer = RowParallelLinear(Partition.balanced(6, group.size), 2, group, bias=True)
    layer.load("bias", torch.tensor([1.0, -2.0]))
    layer.load("weight", torch.zeros(2, 6))
    y: list[float] = layer(torch.zeros(1, layer.weight.shape[1]))[0].tolist()
    return y


def test_a_row_bias_counts_once_however_many_ranks() -> None:
    assert on_threads(5, only_bias) == [[1.0, -2.0]] * 5


def check_merged(group: Group, parts: list[Partition]) -> None:
    """Each part as a column-parallel linear of its own; dx is their sum."""
    layer = MergedColumnParallelLinear(IN, parts, group, bias=True).double()
    twins = [Twin(IN, part.size, bias=True) for part in parts]
    rows = [slice(*part.range(group.rank)) for part in parts]
    for index, twin in enumerate(twins):
        assert twin.bias is not None
        layer.load("weight", twin.weight, index)
        layer.load("bias", twin.bias, index)
    x = twins[0].x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(torch.cat([twin.dy[:, row] for twin, row in zip(twins, rows, strict=True)], 1))
    close(y, torch.cat([twin.y[:, row] for twin, row in zip(twins, rows, strict=True)], 1))
    close(grad(x), sum((grad(twin.x) for twin in twins), torch.zeros_like(x)))
    gradients = [grad(twin.weight) for twin in twins]
    close(grad(layer.weight), torch.cat([g[row] for g, row in zip(gradients, rows, strict=True)]))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data(), ranks=st.integers(1, 6), count=st.integers(2, 3))
def test_merged_columns(data: st.DataObject, ranks: int, count: int) -> None:
    """Parts cut unlike each other: a rank's slices of gate and up need not be equal."""
    on_threads(ranks, check_merged, [data.draw(cuts(ranks)) for _ in range(count)])


def check_qkv(group: Group, heads: HeadPartition, size: int) -> None:
    """The rows of this rank's query heads, then of all KV heads they read, k before v."""
    layer = QKVParallelLinear(IN, heads, size, group, bias=True).double()
    counts = {"q": heads.heads, "k": heads.kv_heads, "v": heads.kv_heads}
    twins = {part: Twin(IN, count * size, bias=True) for part, count in counts.items()}
    for part, twin in twins.items():
        assert twin.bias is not None
        layer.load("weight", twin.weight, part)
        layer.load("bias", twin.bias, part)
    first, last = heads.kv_range(group.rank)
    ranges = (heads.query.range(group.rank), (first, last), (first, last))
    expected = [twin.y[:, a * size : b * size] for twin, (a, b) in zip(twins.values(), ranges, strict=True)]
    close(layer(twins["q"].x), torch.cat(expected, 1))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(kv_heads=st.integers(1, 4), ratio=st.integers(1, 4), ranks=st.integers(1, 6), size=st.sampled_from((1, 2, 3)))
def test_fused_qkv(kv_heads: int, ratio: int, ranks: int, size: int) -> None:
    on_threads(ranks, check_qkv, HeadPartition.balanced(kv_heads * ratio, kv_heads, ranks), size)


def check_replicated(group: Group) -> list[Call]:
    twin, recording = Twin(IN, 4, bias=True), RecordingGroup(group)
    layer = ReplicatedLinear(IN, 4, recording, bias=True).double()
    assert twin.bias is not None
    layer.load("weight", twin.weight)
    layer.load("bias", twin.bias)
    x = twin.x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(twin.dy)
    close(y, twin.y)
    close(grad(x), grad(twin.x))
    close(grad(layer.weight), grad(twin.weight))
    close(grad(layer.bias), grad(twin.bias))
    return recording.calls


def test_replicated_moves_nothing() -> None:
    assert on_threads(3, check_replicated) == [[]] * 3


def test_cuts_over_another_number_of_ranks_are_refused() -> None:
    """Else the rows of absent ranks would silently be missing."""
    cut, group = Partition.balanced(8, 2), SingleGroup()
    said = r"partition=\(4, 4\): linear runs on 1 ranks; give one width for each rank of the group"
    with pytest.raises(UsageError, match=said):
        ColumnParallelLinear(4, cut, group)
    with pytest.raises(UsageError, match=said):
        RowParallelLinear(cut, 4, group)
    with pytest.raises(UsageError, match=said):
        MergedColumnParallelLinear(4, (Partition.balanced(8, 1), cut), group)
    with pytest.raises(UsageError, match=r"partition=\(3, 3\): qkv runs on 1 ranks"):
        QKVParallelLinear(4, HeadPartition.balanced(6, 2, 2), 4, group)
