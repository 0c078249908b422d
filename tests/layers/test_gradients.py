"""Parameters that several ranks hold and each sees in part: summed once, in one all-reduce, only if there are any."""

from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.comm.group import Group
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.single import SingleGroup
from shardwright.layers.gradients import reduce_partial_gradients
from shardwright.layers.layer import ParallelLayer
from shardwright.layers.linear import ColumnParallelLinear, QKVParallelLinear, ReplicatedLinear
from shardwright.layers.norm import RMSNorm
from shardwright.layout.heads import HeadPartition
from shardwright.layout.partition import Partition
from shardwright.testing.models import largest_difference, whole_tensors
from shardwright.testing.ranks import on_threads


def reduce(layer: ParallelLayer, group: Group) -> None:
    reduce_partial_gradients(dict(layer.named_parameters()), [layer.specs(r) for r in range(group.size)], group)


def norm_gradients(group: Group) -> list[float]:
    """Two norms, one seen in part and one seen whole, on inputs of this rank's number; the gradients after reducing."""
    recording, found = RecordingGroup(group), []
    for gradient in ("partial", "whole"):
        norm = RMSNorm(4, recording, gradient=gradient).double()
        share = group.rank + 1 if gradient == "partial" else 1
        norm(torch.ones(1, 4, dtype=torch.float64)).sum().mul(share).backward()
        reduce(norm, recording)
        assert norm.weight.grad is not None
        found += norm.weight.grad.tolist()
    assert [call.op for call in recording.calls] == ["all_reduce"]
    return found


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_a_replicated_parameter_with_partial_gradients_is_reduced_exactly_once(ranks: int) -> None:
    """Shares 1…R sum to R (R + 1) / 2, not R times that; a gradient that is whole already stays as it is.

    To 1e-6: the norm of ones is 1 less eps / 2.
    """
    total = ranks * (ranks + 1) / 2
    for found in on_threads(ranks, norm_gradients):
        assert found == pytest.approx([total] * 4 + [1.0] * 4, rel=1e-6)


def check_qkv(group: Group, heads: HeadPartition) -> int:
    """Gradients of a fused projection whose KV heads straddle ranks, against the unsharded one; float64 to rounding.

    Each rank gives its rows a share of the loss: a KV row is weighed by each query head that reads it.
    """
    size = 2
    twin = QKVParallelLinear(3, HeadPartition.balanced(heads.heads, heads.kv_heads, 1), size, SingleGroup(), bias=True)
    recording = RecordingGroup(group)
    layer = QKVParallelLinear(3, heads, size, recording, bias=True)
    x = torch.arange(12.0, dtype=torch.float64).view(4, 3).sin()
    for one in (twin, layer):
        one.double()
        rank = one.group.rank
        y = one(x).view(4, -1, size)
        n, k = one.heads.query.widths[rank], one.heads.kv_width(rank)
        q, keys, values = y.split([n, k, k], 1)
        index = torch.tensor(one.heads.kv_index(rank), dtype=torch.int64)
        (q * keys[:, index] + values[:, index].sin()).sum().backward()
    recording.calls.clear()
    reduce(layer, recording)
    whole = whole_tensors(gradients(twin), twin.specs())
    assert largest_difference(gradients(layer), layer.specs(), whole) < 1e-13
    return len(recording.calls)


def gradients(layer: ParallelLayer) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("heads", "kv_heads", "ranks", "calls"), [
    (6, 2, 2, 0),
    (6, 2, 4, 1),
    (6, 2, 9, 1),
    (9, 3, 2, 1),
    (5, 1, 3, 1),
    (4, 4, 3, 0),
])  # fmt: skip
def test_straddled_kv_heads_take_one_all_reduce_and_others_none(
    heads: int, kv_heads: int, ranks: int, calls: int
) -> None:
    counted = on_threads(ranks, check_qkv, HeadPartition.balanced(heads, kv_heads, ranks))
    assert counted == [calls] * ranks


def bytes_moved(group: Group) -> list[int]:
    recording = RecordingGroup(group)
    layer = QKVParallelLinear(5, HeadPartition.balanced(6, 2, group.size), 4, recording)
    reduce(layer, recording)
    return [call.bytes for call in recording.calls]


def test_the_buffer_has_a_place_for_each_shared_head_once() -> None:
    """4 ranks over 2 KV heads, both straddling: 2 heads of k and of v, 4 x 5 float32 each, whoever holds them."""
    assert on_threads(4, bytes_moved) == [[2 * 2 * 4 * 5 * 4]] * 4


def unused(group: Group) -> list[Any]:
    norm = RMSNorm(2, group, gradient="partial")
    if group.rank == 1:
        norm(torch.tensor([[1.0, -1.0]])).sum().backward()
    reduce(norm, group)
    return [] if norm.weight.grad is None else norm.weight.grad.tolist()


def test_a_rank_that_did_not_use_the_parameter_receives_the_sum() -> None:
    assert on_threads(3, unused) == [pytest.approx([1.0, -1.0], rel=1e-5)] * 3


def test_nothing_moves_where_nothing_is_partial() -> None:
    def calls(group: Group) -> int:
        recording = RecordingGroup(group)
        for layer in (
            ReplicatedLinear(2, 2, recording, bias=True),
            ColumnParallelLinear(2, Partition.balanced(3, 2), recording),
            RMSNorm(2, recording),
        ):
            reduce(layer, recording)
        return len(recording.calls)

    assert on_threads(2, calls) == [0, 0]
