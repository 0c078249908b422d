"""The table of implementations: every row leads somewhere, and what no row covers is refused."""

from typing import Any

import pytest
import torch

from shardwright.errors import UnsupportedError
from shardwright.kernels import attention, matmul_all_reduce, select

IMPLEMENTATIONS: dict[str, Any] = {
    "attention": attention.IMPLEMENTATIONS,
    "matmul_all_reduce": matmul_all_reduce.IMPLEMENTATIONS,
}


@pytest.mark.parametrize("row", select.TABLE, ids=lambda row: f"{row.kernel}-{row.device}-{row.implementation}")
def test_every_row_names_an_implementation_and_its_reason(row: select.Choice) -> None:
    assert row.implementation in IMPLEMENTATIONS[row.kernel]
    assert row.reason


@pytest.mark.parametrize("kernel", sorted(IMPLEMENTATIONS))
@pytest.mark.parametrize("device", ["cpu", "cuda", "npu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_device_and_type_has_one(kernel: Any, device: str, dtype: torch.dtype) -> None:
    assert select.select(kernel, device, dtype) in IMPLEMENTATIONS[kernel]


def test_meta_tensors_take_the_reference() -> None:
    for kernel in ("attention", "matmul_all_reduce"):
        assert select.select(kernel, "meta", torch.float32) == "reference"


def test_the_first_matching_row_wins_and_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        select.Choice("attention", "cpu", "float32", "narrow", "a test"),
        select.Choice("attention", "cpu", "*", "wide", "a test"),
    )
    monkeypatch.setattr(select, "TABLE", rows)
    assert select.select("attention", "cpu", torch.float32) == "narrow"
    assert select.select("attention", "cpu", torch.bfloat16) == "wide"
    with pytest.raises(UnsupportedError, match="attention: nothing implements it for float32 on cuda; use float32 on"):
        select.select("attention", "cuda", torch.float32)
    with pytest.raises(UnsupportedError, match="matmul_all_reduce: nothing implements it"):
        select.select("matmul_all_reduce", "cpu", torch.float32)
