"""The compiled passes against the reference in float64: widths that fill no vector, strides, nothing, no numbers."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shardwright.kernels import cross_entropy, reference, rms_norm, rotary, swiglu
from shardwright.kernels.cpu import passes
from shardwright.kernels.select import select_local

SHAPES = [(5, 8), (70, 33), (3, 4, 6), (1, 577), (0, 8), (3, 0, 6)]


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(ours: Tensor, exact: Tensor, magnitude: float = 1.0) -> None:
    """4e-6 of the terms' size: sums of up to some hundred float32 terms, reordered, and an exponential's 2e-7."""
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=4e-6, atol=4e-6 * magnitude)


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight, dy = random(*shape), 1 + random(shape[-1], scale=0.1), random(*shape, scale=0.5)
    exact, w = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = reference.rms_norm(exact, w, 1e-5)
    expected.backward(dy.double())
    y, scale = passes.rms_norm(x, weight, 1e-5)
    dx, dweight = passes.rms_norm_backward(x, scale, weight, dy)
    assert scale.shape == (*shape[:-1], 1)
    assert exact.grad is not None
    assert w.grad is not None
    close(y, expected.detach())
    close(dx, exact.grad)
    close(dweight, w.grad, magnitude=10)


def test_many_rows_lose_nothing_in_a_sum() -> None:
    """A weight's gradient over 20,000 rows, to 1e-5: one after another, float32 sums lose 1e-4 of it and more."""
    x, ones = torch.full((20_000, 4), 0.1), torch.ones(20_000, 4)
    _, dweight = passes.rms_norm_backward(x, ones[:, :1], torch.ones(4), ones)
    one_by_one = float(np.cumsum(x[:, 0].numpy(), dtype=np.float32)[-1])
    assert abs(one_by_one / (20_000 * float(x[0, 0])) - 1) > 1e-4
    torch.testing.assert_close(dweight, torch.full((4,), 20_000 * float(x[0, 0])), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(5, 8), (70, 66), (2, 3, 10), (1, 1154), (0, 8), (3, 0)])
def test_swiglu(shape: tuple[int, ...]) -> None:
    """Gates far out too, where an exponential has no float32."""
    gate_up = random(*shape, scale=4)
    gate_up.view(-1)[: min(2, gate_up.numel())] = torch.tensor([300.0, -300.0])[: gate_up.numel()]
    dy = random(*shape[:-1], shape[-1] // 2)
    exact = gate_up.double().requires_grad_()
    expected = reference.swiglu(exact)
    expected.backward(dy.double())
    assert exact.grad is not None
    close(passes.swiglu(gate_up), expected.detach(), magnitude=10)
    close(passes.swiglu_backward(gate_up, dy), exact.grad, magnitude=10)


@pytest.mark.parametrize("heads", [0, 1, 3])
@pytest.mark.parametrize("size", [2, 8, 66])
def test_rotary_of_heads_that_lie_between_others(heads: int, size: int) -> None:
    """Queries are a part of each token's row; turned and turned back they are themselves."""
    x, angles = random(5, heads + 2, size)[:, :heads], random(5, size // 2)
    cos, sin = angles.cos(), angles.sin()
    turned = passes.rotary(x, cos, sin, back=False)
    close(turned, reference.rotary(x.double(), cos.double(), sin.double()))
    close(passes.rotary(turned, cos, sin, back=True), x.double())


@pytest.mark.parametrize("width", [1, 15, 16, 1000])
def test_cross_entropy(width: int) -> None:
    """Logits far below the largest give nothing, and what is taken off a column arrives there."""
    logits = random(7, width, scale=5)
    logits[0, 0] = -200
    column, less, factor = torch.arange(7) % width, random(7), random(7)
    parts, kept = passes.softmax_parts(logits)
    wide = logits.double()
    powers = (wide - wide.amax(1, keepdim=True)).exp()
    assert torch.equal(parts[0], logits.amax(1))
    close(parts[1], powers.sum(1))
    expected = powers * factor.double()[:, None]
    expected[torch.arange(7), column] -= less.double()
    close(passes.cross_entropy_backward(kept, parts, factor, column, less), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 17, 32])
def test_what_is_no_number_stays_none(at: int, bad: float) -> None:
    """A run that looks for such numbers must find them: the compiler may not assume that there are none."""
    x = torch.ones(2, 33)
    x[1, at] = bad
    y = passes.rms_norm(x, torch.ones(33), 1e-5)[0]
    dx, _ = passes.rms_norm_backward(torch.ones(2, 33), torch.ones(2, 1), torch.ones(33), x)
    parts, _ = passes.softmax_parts(x)
    both = torch.cat((x, torch.ones(2, 33)), 1)
    for found in (y, dx, parts[1][:, None], passes.swiglu(both)):
        assert found[0].isfinite().all()
        assert not found[1].isfinite().all()


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MODULES = {"rms_norm": rms_norm, "rotary": rotary, "swiglu": swiglu, "cross_entropy": cross_entropy}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kernel", MODULES)
def test_they_run_where_torch_has_one_thread(kernel: Any) -> None:
    """With several, torch's operations share the work out."""
    assert select_local(kernel, torch.ones(1)) == "compiled"
    assert "compiled" in MODULES[kernel].IMPLEMENTATIONS
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")):
        assert select_local(kernel, torch.ones(1, dtype=dtype, device=device)) == "reference"
    torch.set_num_threads(2)
    assert select_local(kernel, torch.ones(1)) == "reference"


@pytest.mark.usefixtures("one_thread")
def test_an_exported_program_has_torchs_operations() -> None:
    """Where a program is taken down, tensors have no memory to give the address of."""

    class Between(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return swiglu.swiglu(rms_norm.rms_norm(x, weight, 1e-5))

    x, weight = random(3, 8), random(8)
    with torch.no_grad():
        exported = torch.export.export(Between(), (x, weight)).module()
        close(exported(x, weight), Between()(x, weight).double())
