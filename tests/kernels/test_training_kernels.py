"""RMSNorm, rotary embedding and SwiGLU for training: the reference's values forward, autograd's gradients backward."""

import pytest
import torch
from torch import Tensor

from shardwright.kernels import reference
from shardwright.kernels.rms_norm import rms_norm
from shardwright.kernels.rotary import rotary
from shardwright.kernels.swiglu import swiglu


def wave(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.arange(torch.Size(shape).numel()).double() * 0.7).sin().view(shape).to(dtype)


def gradients(run: object, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    assert callable(run)
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = run(*leaves)
    (y * wave(*y.shape, dtype=y.dtype).cos()).sum().backward()
    return y.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("shape", [(5, 8), (3, 4, 6), (0, 8), (3, 0, 6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """To a few roundings: a row's length is squared again, and bfloat16 rounds once where autograd does thrice."""
    x, weight = wave(*shape, dtype=dtype), 1 + wave(shape[-1], dtype=dtype)
    y, ours = gradients(lambda x, w: rms_norm(x, w, 1e-5), x, weight)
    expected, theirs = gradients(lambda x, w: reference.rms_norm(x, w, 1e-5), x, weight)
    eps = torch.finfo(dtype).eps
    for mine, other in zip((y, rms_norm(x, weight, 1e-5), *ours), (expected, expected, *theirs), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, other, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("heads", [0, 3])
def test_rotary(heads: int) -> None:
    """float64: values bit for bit, gradients to rounding."""
    x, angles = wave(5, heads, 8, dtype=torch.float64), wave(5, 4, dtype=torch.float64)
    y, ours = gradients(lambda x: rotary(x, angles.cos(), angles.sin()), x)
    expected, theirs = gradients(lambda x: reference.rotary(x, angles.cos(), angles.sin()), x)
    assert torch.equal(y, expected)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", [(5, 8), (0, 8), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """With and without a graph. Bit for bit, being the same products in the same order, but for float32 on one thread,
    whose compiled exponential is another one: 4e-7.
    """
    gate_up = wave(*shape, dtype=dtype) * 3
    y, ours = gradients(swiglu, gate_up)
    expected, theirs = gradients(reference.swiglu, gate_up)
    assert torch.equal(swiglu(gate_up), y)
    other = 1e-6 if dtype == torch.float32 else 0.0
    torch.testing.assert_close((y, ours[0]), (expected, theirs[0]), rtol=other, atol=other)
