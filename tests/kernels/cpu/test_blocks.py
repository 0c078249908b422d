"""The loops of a compiled step, against numpy in float64."""

import numpy as np
import pytest
import torch

from shardwright.kernels.cpu import blocks
from shardwright.kernels.cpu.vectors import STEP, exp32

SIZES = (0, 1, STEP - 1, STEP, STEP + 1, 2 * STEP, 308, 577)
"""Lengths of rows: nothing, less than a step of vectors, whole steps, and a rest behind them."""


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize("vectors", [1, 4, 23])
def test_matvec(vectors: int, rows: int, width: int, half: bool) -> None:
    """1e-6 of the sum of magnitudes: float32 products summed in another order, some 5 roundings deep."""
    generator = torch.Generator().manual_seed(width)
    w, x = torch.randn(rows, width, generator=generator), torch.randn(vectors, width, generator=generator)
    w = w.bfloat16() if half else w
    y = np.full((vectors, rows), np.nan, np.float32)
    blocks.matvec(w.view(torch.uint16).numpy() if half else w.numpy(), x.numpy(), y)
    exact, magnitude = x.double() @ w.double().T, x.abs().double() @ w.abs().double().T
    assert (torch.from_numpy(y) - exact).abs().le(1e-6 * magnitude).all()


def test_matvec_meets_every_vector_in_every_block_of_rows() -> None:
    """More rows than a block has; exact, as all terms are small integers."""
    rows = 2 * (blocks.BLOCK // 64 + 1) + 5
    w = (np.arange(rows * 64) % 7).astype(np.float32).reshape(rows, 64)
    x = (np.arange(2 * 64) % 3).astype(np.float32).reshape(2, 64)
    y = np.zeros((2, rows), np.float32)
    blocks.matvec(w, x, y)
    assert (y == x @ w.T).all()


@pytest.mark.parametrize("row", [[3.0], [1, 5, 5, 2], [-np.inf, -np.inf], [-2, -1], list(range(1000))])
def test_argmax_is_the_first_of_the_largest(row: list[float]) -> None:
    values = np.array(row, np.float32)
    assert blocks.argmax(values) == values.argmax()


def test_a_bfloat16_row_is_copied_as_float32() -> None:
    """Exact: every bfloat16 is a float32."""
    row = torch.randn(33, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = np.zeros(33, np.float32)
    blocks.copy_row(row.view(torch.uint16).numpy(), y)
    assert (torch.from_numpy(y) == row.float()).all()


def test_exp32() -> None:
    """2e-7: a polynomial's 1e-7 and a rounding or two, of float64's. 0 below -87; above 87 it stays as it is."""
    x = np.linspace(-87, 87, 1_000_001, dtype=np.float32)
    ours = np.array([exp32(v) for v in x[::97]])
    np.testing.assert_allclose(ours, np.exp(x[::97].astype(np.float64)), rtol=2e-7)
    assert exp32(np.float32(0)) == 1
    assert 0 < exp32(np.float32(-87)) < 2e-38
    assert exp32(np.float32(-87.1)) == exp32(np.float32(-np.inf)) == 0
    assert np.isnan(exp32(np.float32(np.nan)))
    assert exp32(np.float32(1000)) == exp32(np.float32(87)) > 6e37


@pytest.mark.parametrize("width", [0, 1, 33])
def test_swiglu(width: int) -> None:
    """1e-6: a product of three float32 roundings, and large gates of both signs."""
    gate, up = (torch.randn(2, width, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    gate *= 40
    y = np.full((2, width), np.nan, np.float32)
    blocks.swiglu(torch.cat((gate, up), 1).numpy(), y)
    exact = torch.nn.functional.silu(gate.double()) * up
    torch.testing.assert_close(torch.from_numpy(y).double(), exact, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("size", [4, 64, 100])
@pytest.mark.parametrize("first", [0, 1, 8, 13])
@pytest.mark.parametrize("held", [1, 7, 8, 9, 30])
def test_attend(held: int, first: int, size: int) -> None:
    """Windows that begin and end in the middle of pages of 8, which lie in no order; 5 heads over 2 of keys and values.

    2e-6 of the values, which are about 1: scores of some 100 terms, e^x to 2e-7 of it, at most 30 weights.
    """
    first = min(first, held - 1)
    generator = np.random.default_rng(held)
    q = generator.standard_normal((5, size), np.float32)
    keys, values = generator.standard_normal((2, 5, 8, 2, size), np.float32)
    table, kv_index = np.array([3, 0, 4, 1]), np.array([0, 0, 0, 1, 1])
    scores, y = np.full(held, np.nan, np.float32), np.full((5, size), np.nan, np.float32)
    blocks.attend(q, keys, values, table, first, held, kv_index, scores, y)
    for h, k in enumerate(kv_index):
        seen = slice(first, held)
        own_keys, own_values = (kv[table].reshape(32, 2, size)[seen, k].astype(np.float64) for kv in (keys, values))
        weights = np.exp(own_keys @ q[h] / np.sqrt(size))
        np.testing.assert_allclose(y[h], weights @ own_values / weights.sum(), rtol=0, atol=2e-6)
