"""Every implementation of attention against the reference: outputs and gradients, over shapes that divide nothing.

Float64, to 1e-12: blocks are summed in another order (1e-15). Halves to 4 units in the last place of the largest value:
one side rounds the weights before they meet the values, the other does not.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwright.kernels import reference
from shardwright.kernels.attention import IMPLEMENTATIONS, attention
from shardwright.kernels.select import select

OTHERS = sorted(IMPLEMENTATIONS.keys() - {"reference"})
Shape = tuple[int, int, int, int, tuple[int, ...]]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """S, L, K_r, D and for each query head its KV head, in any order or in groups of one size."""
    length = draw(st.integers(0, 7))
    held = length + draw(st.sampled_from((0, 0, 1, 5)))
    kv_heads = draw(st.integers(0, 3))
    anyhow = st.lists(st.integers(0, kv_heads - 1), max_size=5) if kv_heads else st.just([])
    grouped = st.integers(1, 3).map(lambda size: [kv for kv in range(kv_heads) for _ in range(size)])
    index = draw(anyhow | grouped)
    return length, held, kv_heads, draw(st.sampled_from((2, 4, 6, 16, 64))), tuple(index)


def tensors(shape: Shape, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    length, held, kv_heads, size, index = shape
    generator = torch.Generator().manual_seed(17)
    sizes = ((length, len(index), size), (held, kv_heads, size), (held, kv_heads, size))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes)
    return q, k, v


def outcome(
    kernel: Callable[..., Tensor], qkv: Sequence[Tensor], index: Sequence[int]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and the gradients of a sum that weighs each of its values differently."""
    leaves = [x.clone().requires_grad_() for x in qkv]
    y = kernel(*leaves, index, 0.3)
    weights = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).sin()
    return y.detach(), torch.autograd.grad((y * weights).sum(), leaves)


@pytest.mark.parametrize("name", OTHERS)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(shape=shapes())
def test_equals_the_reference(name: str, shape: Shape) -> None:
    qkv, index = tensors(shape), shape[-1]
    found, gradients = outcome(IMPLEMENTATIONS[name], qkv, index)
    expected, theirs = outcome(reference.attention, qkv, index)
    for x, y in zip((found, *gradients), (expected, *theirs), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(IMPLEMENTATIONS[name](*qkv, index, 0.3), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(5, 5, 2, 64, (0, 0, 0, 1, 1)), (1, 9, 2, 64, (1, 0)), (3, 8, 1, 6, (0,)), (4, 4, 0, 8, ())]
)
def test_narrower_types_equal_the_reference(name: str, dtype: torch.dtype, shape: Shape) -> None:
    qkv = tensors(shape, dtype)
    found = IMPLEMENTATIONS[name](*qkv, shape[-1], 0.3)
    assert found.dtype == dtype
    wide = reference.attention(*(x.double() for x in qkv), shape[-1], 0.3)
    scale = float(wide.abs().max()) if wide.numel() else 1.0
    torch.testing.assert_close(found.double(), wide, rtol=0, atol=4 * torch.finfo(dtype).eps * scale)


@pytest.mark.parametrize("name", sorted(IMPLEMENTATIONS))
def test_later_keys_are_never_seen(name: str) -> None:
    """Huge keys and values behind a position leave it as it was, to float64 rounding, and change the last one."""
    shape = (4, 6, 2, 6, (0, 1, 1))
    q, k, v = tensors(shape)
    expected = IMPLEMENTATIONS[name](q, k, v, shape[-1], 0.3)
    k[-1], v[-1] = 1e6, 1e6
    found = IMPLEMENTATIONS[name](q, k, v, shape[-1], 0.3)
    torch.testing.assert_close(found[:-1], expected[:-1], rtol=0, atol=1e-15)
    assert not torch.allclose(found[-1], expected[-1])


def test_the_table_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Any] = []
    name = select("attention", "cpu", torch.float64)
    monkeypatch.setitem(IMPLEMENTATIONS, name, lambda *arguments: chosen.append(arguments))
    attention(*tensors((1, 1, 1, 2, (0,))), (0,), 1.0)
    assert len(chosen) == 1


@pytest.mark.parametrize("window", [0, 1, 3, 9, 20])
@pytest.mark.parametrize("cap", [0.0, 0.7])
@pytest.mark.parametrize(("length", "held"), [(7, 7), (3, 9), (1, 9), (1, 1), (0, 4)])
def test_windows_and_caps_by_the_definition(length: int, held: int, window: int, cap: float) -> None:
    """A loop over heads, queries and the keys each may see, in float64 to another order of summation."""
    shape = (length, held, 2, 6, (0, 1, 1))
    q, k, v = tensors(shape)
    found = attention(q, k, v, shape[-1], 0.3, window, cap)
    assert found.shape == q.shape
    for row in range(length):
        at = held - length + row
        first = max(0, at - window + 1) if window else 0
        for head, source in enumerate(shape[-1]):
            scores = k[first : at + 1, source] @ q[row, head] * 0.3
            scores = cap * (scores / cap).tanh() if cap else scores
            expected = scores.softmax(0) @ v[first : at + 1, source]
            torch.testing.assert_close(found[row, head], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("window", [1, 2, 5, 100])
@pytest.mark.parametrize(("length", "held"), [(7, 7), (3, 9), (1, 9)])
def test_windows_equal_the_reference(name: str, length: int, held: int, window: int) -> None:
    """Called by itself, before `attention` has left out keys that nobody sees."""
    shape = (length, held, 2, 6, (0, 1, 1))
    found = IMPLEMENTATIONS[name](*tensors(shape), shape[-1], 0.3, window)
    expected = reference.attention(*tensors(shape), shape[-1], 0.3, window)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("cap", [0.0, 0.7])
@pytest.mark.parametrize("slopes", [(), (0.5, 0.25, 0.125)])
@pytest.mark.parametrize(("length", "held"), [(5, 5), (2, 6), (1, 4)])
def test_sequences_alike_are_computed_together(
    length: int, held: int, window: int, cap: float, slopes: tuple[float, ...]
) -> None:
    """As each by itself, gradients too; 1e-12 as kernels may sum in another order."""
    shape = (length, held, 2, 6, (0, 0, 1))
    stack = [torch.stack((x, x.cos(), -x)).requires_grad_() for x in tensors(shape)]

    def run(*qkv: Tensor) -> Tensor:
        return attention(*qkv, shape[-1], 0.3, window, cap, slopes)

    found = run(*stack)
    expected = torch.stack([run(*each) for each in zip(*stack, strict=True)])
    weights = torch.arange(found.numel()).double().sin().view(found.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), stack) for y in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
