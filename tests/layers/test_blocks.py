"""Attention, SwiGLU and the norms as layers, against the definition spelled out on whole tensors, any split.

Float64, forward and backward, to 1e-12: another order of summation is some 1e-15.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.comm.group import Group
from shardwright.comm.recording import RecordingGroup
from shardwright.kernels.reference import rms_norm, rotary
from shardwright.layers.attention import Attention, HeadNormAttention
from shardwright.layers.batch import Batch
from shardwright.layers.kv import FreshKV
from shardwright.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from shardwright.layers.mlp import SwiGLU
from shardwright.layers.norm import RMSNorm
from shardwright.layers.rotary import Rotary
from shardwright.layout.heads import HeadPartition
from shardwright.layout.partition import Partition
from shardwright.testing.ranks import on_threads

HIDDEN, FEATURES, SIZE = 5, 7, 4
FREQUENCIES = (1.0, 0.3)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(ours: Tensor | None, theirs: Tensor | None) -> None:
    assert ours is not None
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def compared(group: RecordingGroup, block: nn.Module, arguments: tuple[Any, ...], x: Tensor, expected: Tensor) -> None:
    """`block(x, *arguments)` and dx against `expected`, which was computed from `x`; one all-reduce each way."""
    dy = random(*expected.shape, seed=9)
    expected.backward(dy)
    mine = x.detach().clone().requires_grad_()
    y = block(mine, *arguments)
    y.backward(dy)
    close(y, expected)
    close(mine.grad, x.grad)
    assert [call.op for call in group.calls] == ["all_reduce"] * 2


def check_attention(group: Group, heads: HeadPartition, normed: bool) -> None:
    n, k = heads.heads, heads.kv_heads
    q_w, k_w, v_w = (random(rows * SIZE, HIDDEN, seed=i) for i, rows in enumerate((n, k, k)))
    out_w, out_b, norm_w = random(HIDDEN, n * SIZE, seed=3), random(HIDDEN, seed=4), random(SIZE, seed=5)
    batch = Batch.whole([[0] * 4, [0], [0] * 3])
    x = random(8, HIDDEN, seed=6).requires_grad_()
    rope = Rotary(FREQUENCIES)(batch.positions, torch.float64)

    def projected(weight: Tensor, norm: bool) -> Tensor:
        y = (x @ weight.T).view(8, -1, SIZE)
        return rotary(rms_norm(y, norm_w, 1e-6) if norm and normed else y, *rope) if norm else y

    q, keys, values = projected(q_w, True), projected(k_w, True), projected(v_w, False)
    rows = []
    for start, stop in batch.ranges:
        for row in range(start, stop):
            for head in range(n):
                scores = keys[start : row + 1, head // heads.group] @ q[row, head] / SIZE**0.5
                rows.append(scores.softmax(0) @ values[start : row + 1, head // heads.group])
    expected = torch.stack(rows).view(8, n * SIZE) @ out_w.T + out_b

    recording = RecordingGroup(group)
    qkv = QKVParallelLinear(HIDDEN, heads, SIZE, recording)
    out = RowParallelLinear(heads.query.times(SIZE), HIDDEN, recording, bias=True)
    norms = RMSNorm(SIZE, recording), RMSNorm(SIZE, recording)
    block = (HeadNormAttention(qkv, out, *norms) if normed else Attention(qkv, out)).double()
    for norm in norms:
        norm.load("weight", norm_w)
    for part, weight in zip("qkv", (q_w, k_w, v_w), strict=True):
        qkv.load("weight", weight, part)
    out.load("weight", out_w)
    out.load("bias", out_b)
    compared(recording, block, (rope, batch, FreshKV()), x, expected)


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
@pytest.mark.parametrize("normed", [False, True])
def test_attention(ranks: int, normed: bool) -> None:
    """6 query heads over 2 KV heads: at 4 ranks both straddle, at 7 a rank has none."""
    on_threads(ranks, check_attention, HeadPartition.balanced(6, 2, ranks), normed)


def test_attention_of_an_uneven_rank() -> None:
    """5 query heads of 2 KV heads' groups on one rank, 1 on the other: one rank repeats them 3 and 2 times."""
    on_threads(2, check_attention, HeadPartition(Partition.explicit([5, 1]), 2), False)


def check_swiglu(group: Group, cut: Partition) -> None:
    gate, up, down = random(FEATURES, HIDDEN), random(FEATURES, HIDDEN, seed=1), random(HIDDEN, FEATURES, seed=2)
    x = random(3, HIDDEN, seed=3).requires_grad_()
    recording = RecordingGroup(group)
    gate_up = MergedColumnParallelLinear(HIDDEN, (cut, cut), recording)
    block = SwiGLU(gate_up, RowParallelLinear(cut, HIDDEN, recording)).double()
    gate_up.load("weight", gate, 0)
    gate_up.load("weight", up, 1)
    block.down.load("weight", down)
    compared(recording, block, (), x, (F.silu(x @ gate.T) * (x @ up.T)) @ down.T)


@pytest.mark.parametrize("widths", [[7], [4, 3], [0, 7], [3, 0, 4], [2, 1, 1, 1, 1, 1], [1] * 7 + [0]])
def test_swiglu(widths: list[int]) -> None:
    on_threads(len(widths), check_swiglu, Partition.explicit(widths))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotary_angles_are_float32_whatever_the_type(dtype: torch.dtype) -> None:
    """Bit for bit: a module cast to half must not round its frequencies, and is not touched by a meta device."""
    with torch.device("meta"):
        layer = Rotary((1.0, 1 / 3)).to(dtype)
    positions = torch.tensor([0, 1, 5000])
    cos, sin = layer(positions, dtype)
    angles = positions[:, None].float() * torch.tensor([1.0, 1 / 3])
    assert torch.equal(cos, angles.cos().to(dtype))
    assert torch.equal(sin, angles.sin().to(dtype))
    assert not list(layer.parameters())
    assert not list(layer.buffers())


def test_a_norm_starts_at_one_and_is_alike_on_all_ranks() -> None:
    def norm(group: Group) -> list[float]:
        layer = RMSNorm(4, group, eps=0.0)
        y: list[float] = layer(torch.tensor([3.0, -3.0, 3.0, -3.0])).tolist()
        return y

    assert on_threads(3, norm) == [[1.0, -1.0, 1.0, -1.0]] * 3
