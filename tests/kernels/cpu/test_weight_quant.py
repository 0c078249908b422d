"""Weights of int8 and int4 that are never whole as floats: against float64, in every layout and every way through."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwright.comm.group import Group
from shardwright.comm.thread import ThreadGroup
from shardwright.kernels import quant, select
from shardwright.kernels.cpu import weight_quant
from shardwright.kernels.matmul_all_reduce import matmul_all_reduce

TOLERANCE = 2e-5
"""Of the largest sum of magnitudes: float32 sums of up to 300 products of 8-bit values, in any order, lose some
300 * 2⁻²⁴ of it."""

LAYOUTS = ("int8", "int8 transposed", "int4 n", "int4 n transposed", "int4 k", "int4 k transposed")


def stored(weight: Tensor, layout: str) -> Tensor:
    """An integer weight `[k, n]` as the operator takes it, packed and laid out so."""
    x2 = weight.to(torch.int8)
    if "int4" in layout:
        x2 = quant.pack_int4(weight) if " n" in layout else quant.pack_int4(weight.T.contiguous()).T
    return x2.T.contiguous().T if "transposed" in layout else x2.contiguous()


def floating(weight: Tensor, scale: Tensor, offset: Tensor | None, group: int) -> Tensor:
    """The weight in float64, by the formula."""

    def whole(x: Tensor) -> Tensor:
        return x.double().repeat_interleave(group, 0)[: len(weight)] if group else x.double()

    return (weight.double() + (0 if offset is None else whole(offset))) * whole(scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 20),
    k=st.integers(1, 37),
    n=st.integers(1, 40),
    group=st.sampled_from([0, 32, 64]),
    scales=st.sampled_from(["one", "column", "row"]),
    with_offset=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
def test_products_equal_float64s(
    layout: str,
    rows: int,
    k: int,
    n: int,
    group: int,
    scales: str,
    with_offset: bool,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    k, n = (k * 8 if " k" in layout else k * 5), (n * 8 if " n" in layout else n)
    group = group if group < k else 0
    low, high = (-8, 8) if "int4" in layout else (-128, 128)
    weight = torch.randint(low, high, (k, n), generator=random)
    shape = (-(-k // group), n) if group else {"one": (1,), "column": (n,), "row": (1, n)}[scales]
    scale = torch.rand(shape, generator=random) + 0.1
    offset = torch.randint(-8, 8, shape, generator=random).float() if with_offset else None
    x = torch.randn(rows, k, generator=random)
    packed = "k" if " k" in layout else "n" if " n" in layout else None
    described = quant.WeightQuant(scale, offset, group, packed)
    found = weight_quant.product(x, stored(weight, layout), described, n)
    expected = floating(weight, scale, offset, group)
    magnitudes = x.double().abs() @ (weight.double().abs() + 8) * scale.max()
    assert (found - x.double() @ expected).abs().max() <= TOLERANCE * magnitudes.max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 40, 513], ids=lambda rows: f"{rows} rows")
def test_every_number_of_rows_has_its_way_through(layout: str, rows: int) -> None:
    """More columns than a block of sums and than a strip, so that both end within the weight."""
    random = torch.Generator().manual_seed(rows)
    k, n = 72, 2056 + weight_quant.BROAD
    weight, scale = torch.randint(-8, 8, (k, n), generator=random), torch.rand(3, n, generator=random) + 0.1
    x = torch.randn(rows, k, generator=random)
    packed = "k" if " k" in layout else "n" if " n" in layout else None
    described = quant.WeightQuant(scale, None, 32, packed)
    found = weight_quant.product(x, stored(weight, layout), described, n)
    expected = x.double() @ floating(weight, scale, None, 32)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def check_operator(group: Group, k_r: int) -> None:
    """Bias and x3 count once a rank; a rank whose share is empty still adds them. Reference: float64, all ranks'."""
    random = torch.Generator().manual_seed(1)
    shares = [k_r * (rank % 3) for rank in range(group.size)]
    weight = torch.randint(-128, 128, (sum(shares), 24), generator=random)
    bias, x3, scale = (torch.randn(*shape, generator=random) for shape in ((24,), (2, 3, 24), (24,)))
    x = torch.randn(2, 3, sum(shares), generator=random)
    mine = torch.split(weight, shares)[group.rank].to(torch.int8)
    found = matmul_all_reduce(
        torch.split(x, shares, -1)[group.rank], mine, group, bias=bias, x3=x3, antiquant_scale=scale
    )
    expected = x.double() @ (weight.double() * scale.double()) + group.size * (bias + x3).double()
    assert found.shape == (2, 3, 24)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_operator_sums_over_ranks(ranks: int) -> None:
    ThreadGroup.run(ranks, lambda group: check_operator(group, 40))


def test_the_table_takes_it_where_it_can_run() -> None:
    def choose(dtype: torch.dtype, device: str = "cpu", turns: int = 0) -> str:
        return select.select("matmul_all_reduce", device, dtype, mode="weight-quant", turns=turns)

    assert choose(torch.float32) == "strips"
    assert choose(torch.float32, turns=2) == "chunked"
    assert {choose(torch.bfloat16), choose(torch.float64), choose(torch.float32, "cuda")} == {"reference"}


def test_without_numba_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "find_spec", lambda name: None)
    select.select.cache_clear()
    try:
        assert select.select("matmul_all_reduce", "cpu", torch.float32, mode="weight-quant") == "reference"
    finally:
        select.select.cache_clear()
