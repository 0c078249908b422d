"""RMSNorm and rotary embedding for training: the reference's bits forward, autograd's gradients backward."""

import pytest
import torch
from torch import Tensor

from shardwright.kernels import reference
from shardwright.kernels.rms_norm import rms_norm
from shardwright.kernels.rotary import rotary


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
    """Values bit for bit. Gradients to a few roundings: bfloat16 rounds once where autograd rounds at each step."""
    x, weight = wave(*shape, dtype=dtype), 1 + wave(shape[-1], dtype=dtype)
    y, ours = gradients(lambda x, w: rms_norm(x, w, 1e-5), x, weight)
    expected, theirs = gradients(lambda x, w: reference.rms_norm(x, w, 1e-5), x, weight)
    assert torch.equal(y, expected)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(mine, other, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("heads", [0, 3])
def test_rotary(heads: int) -> None:
    """float64: values bit for bit, gradients to rounding."""
    x, angles = wave(5, heads, 8, dtype=torch.float64), wave(5, 4, dtype=torch.float64)
    y, ours = gradients(lambda x: rotary(x, angles.cos(), angles.sin()), x)
    expected, theirs = gradients(lambda x: reference.rotary(x, angles.cos(), angles.sin()), x)
    assert torch.equal(y, expected)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-14, atol=1e-14)
