"""`matmul_all_reduce`: its contract, its refusals, its gradients, its one collective."""

from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.comm.group import Group
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.single import SingleGroup
from shardwright.errors import UsageError
from shardwright.kernels.matmul_all_reduce import matmul_all_reduce
from shardwright.layout.partition import Partition
from shardwright.testing.ranks import on_threads

K, N = 7, 5


def whole(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_against_whole(group: Group, shape: tuple[int, ...], widths: list[int]) -> None:
    """Forward and gradients against `x1 @ x2 + bias + x3`; float64 to another order of summation.

    bias and x3 go in on rank 0 only, as the contract says; x2 is a transposed view, as a linear's weight is.
    """
    leaves = [x.requires_grad_() for x in (whole(*shape, K), whole(N, K, seed=1), whole(N, seed=2), whole(*shape, N))]
    x1, weight, bias, x3 = leaves
    expected = x1 @ weight.T + bias + x3
    expected.sin().sum().backward()
    start, stop = Partition.explicit(widths).range(group.rank)
    mine = [x.detach().clone().requires_grad_() for x in (x1[..., start:stop], weight[:, start:stop], bias, x3)]
    recording = RecordingGroup(group)
    first: dict[str, Any] = {"bias": mine[2], "x3": mine[3]} if group.rank == 0 else {}
    y = matmul_all_reduce(mine[0], mine[1].T, recording, **first, tag="here")
    y.sin().sum().backward()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
    gradients = [x1.grad[..., start:stop], weight.grad[:, start:stop], bias.grad, x3.grad]  # type: ignore[index]
    for ours, theirs in list(zip(mine, gradients, strict=True))[: 4 if first else 2]:
        torch.testing.assert_close(ours.grad, theirs, rtol=0, atol=1e-13)
    assert [(call.op, call.bytes, call.tag) for call in recording.calls] == [("all_reduce", y.numel() * 8, "here")]


@pytest.mark.parametrize("shape", [(4,), (1,), (0,), (2, 3)])
@pytest.mark.parametrize("widths", [[7], [4, 3], [0, 7], [3, 0, 4, 0], [1, 1, 1, 1, 2, 1]])
def test_equals_the_whole_matmul(shape: tuple[int, ...], widths: list[int]) -> None:
    on_threads(len(widths), check_against_whole, shape, widths)


def every_rank_adds(group: Group) -> Tensor:
    one = torch.ones(1, 1)
    return matmul_all_reduce(one, one, group, bias=torch.ones(1), x3=one)


def test_bias_and_x3_count_once_a_rank_that_passes_them() -> None:
    """They are added before the reduce: 3 ranks of 1 x 1 + 1 + 1."""
    assert [y.item() for y in on_threads(3, every_rank_adds)] == [9.0] * 3


X1, X2 = torch.zeros(4, 7), torch.zeros(7, 5)


@pytest.mark.parametrize(("arguments", "options", "said"), [
    ((X1, X2), {"reduce_op": "max"}, "reduce_op=max: only a sum distributes over the split matmul; use 'sum'"),
    ((X1, X2[0]), {}, r"x2=\[5\]: x2 is \[k, n\]"),
    ((X1, X2[None]), {}, r"x2=\[1, 7, 5\]: x2 is \[k, n\]"),
    ((X1[0], X2), {}, r"x1=\[7\]: x1 is \[m, k\] or \[b, s, k\] with k = 7"),
    ((X1[None, None], X2), {}, r"x1=\[1, 1, 4, 7\]: x1 is"),
    ((X1[:, 1:], X2), {}, r"x1=\[4, 6\]: x1 is .* with k = 7; match x2's rows"),
    ((X1, X2.half()), {}, "x2=float16: x1 is float32; convert one of them"),
    ((X1, X2), {"bias": torch.zeros(4)}, r"bias=float32 \[4\]: bias is float32 \[5\]"),
    ((X1, X2), {"bias": torch.zeros(5).half()}, r"bias=float16 \[5\]: bias is float32 \[5\]"),
    ((X1, X2), {"x3": torch.zeros(5)}, r"x3=float32 \[5\]: x3 is like the output, float32 \[4, 5\]"),
    ((X1, X2), {"x3": torch.zeros(4, 5).double()}, r"x3=float64 \[4, 5\]: x3 is like the output, float32 \[4, 5\]"),
])  # fmt: skip
def test_what_breaks_the_contract_is_refused(arguments: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        matmul_all_reduce(*arguments, SingleGroup(), **options)
