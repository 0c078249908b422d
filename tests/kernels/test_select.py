"""The table of implementations: every row leads somewhere, and what no row covers is refused."""

from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch

from shardwright.comm.single import SingleGroup
from shardwright.errors import UnsupportedError
from shardwright.kernels import attention, cross_entropy, matmul_all_reduce, rms_norm, rotary, select, siblings, swiglu
from shardwright.kernels.operands import Mode

IMPLEMENTATIONS: dict[str, Any] = {
    "attention": attention.IMPLEMENTATIONS,
    "matmul_all_reduce": matmul_all_reduce.IMPLEMENTATIONS,
    "all_gather_matmul": siblings.GATHER,
    "matmul_reduce_scatter": siblings.SCATTER,
    "matmul_all_reduce_add_rms_norm": siblings.NORM,
    "rms_norm": rms_norm.IMPLEMENTATIONS,
    "rotary": rotary.IMPLEMENTATIONS,
    "swiglu": swiglu.IMPLEMENTATIONS,
    "cross_entropy": cross_entropy.IMPLEMENTATIONS,
}


Replace = Callable[[tuple[select.Choice, ...]], None]


@pytest.fixture
def replace_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Replace]:
    """Puts other rows in the table's place; choices made from either are forgotten."""

    def replace(rows: tuple[select.Choice, ...]) -> None:
        monkeypatch.setattr(select, "TABLE", rows)
        select.select.cache_clear()

    yield replace
    select.select.cache_clear()


@pytest.mark.parametrize("row", select.TABLE, ids=lambda row: f"{row.kernel}-{row.device}")
def test_every_row_names_an_implementation_and_its_reason(row: select.Choice) -> None:
    assert row.implementation in IMPLEMENTATIONS[row.kernel]
    assert row.reason


@pytest.mark.parametrize("kernel", sorted(IMPLEMENTATIONS))
@pytest.mark.parametrize("device", ["cpu", "cuda", "npu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_every_device_and_type_has_one(kernel: Any, device: str, dtype: torch.dtype) -> None:
    assert select.select(kernel, device, dtype) in IMPLEMENTATIONS[kernel]


@pytest.mark.parametrize("kernel", sorted(IMPLEMENTATIONS))
def test_meta_tensors_take_the_reference(kernel: Any) -> None:
    assert select.select(kernel, "meta", torch.float32) == "reference"


@pytest.mark.parametrize("kernel", ["matmul_all_reduce", "matmul_all_reduce_add_rms_norm"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "npu", "meta"])
@pytest.mark.parametrize("group", ["SingleGroup", "ThreadGroup", "SharedMemoryGroup", "TorchGroup"])
def test_a_call_that_says_how_often_to_cut_is_cut(kernel: Any, device: str, group: str) -> None:
    for mode in get_args(Mode):
        for turns in (1, 7):
            assert select.select(kernel, device, torch.float32, mode=mode, group=group, turns=turns) == "chunked"


def test_of_calls_that_leave_it_open_only_large_ones_over_gloo_are_cut() -> None:
    """Where that was measured to be quicker: 1024 rows of 8192 columns and more."""
    large: dict[str, Any] = {"mode": "plain", "group": "TorchGroup", "elements": 1024 * 8192}
    assert select.select("matmul_all_reduce", "cpu", torch.float32, **large) == "chunked"
    for other in ({"mode": "weight-quant"}, {"group": "ThreadGroup"}, {"elements": 1024 * 8192 - 1}):
        assert select.select("matmul_all_reduce", "cpu", torch.float32, **(large | other)) != "chunked"
    for device, dtype in (("meta", torch.float32), ("cuda", torch.float32), ("cpu", torch.bfloat16)):
        assert select.select("matmul_all_reduce", device, dtype, **large) != "chunked"


def test_the_first_matching_row_wins_and_none_is_an_error(replace_table: Replace) -> None:
    rows = (
        select.Choice(kernel="attention", device="cpu", dtype="float32", implementation="narrow", reason="a test"),
        select.Choice(kernel="attention", device="cpu", implementation="wide", reason="a test"),
    )
    replace_table(rows)
    assert select.select("attention", "cpu", torch.float32) == "narrow"
    assert select.select("attention", "cpu", torch.bfloat16) == "wide"
    with pytest.raises(UnsupportedError, match="attention: nothing implements it for float32 on cuda; use float32 on"):
        select.select("attention", "cuda", torch.float32)
    with pytest.raises(UnsupportedError, match="matmul_all_reduce: nothing implements it"):
        select.select("matmul_all_reduce", "cpu", torch.float32)


def test_a_row_may_ask_for_a_mode_a_kind_of_group_a_size_and_turns(replace_table: Replace) -> None:
    special: dict[str, Any] = {"mode": "plain", "group": "SingleGroup", "elements": 6, "turns": 2}
    rows = (
        select.Choice(kernel="matmul_all_reduce", implementation="special", reason="a test", **special),
        select.Choice(kernel="matmul_all_reduce", implementation="rest", reason="a test"),
    )
    replace_table(rows)
    assert select.select("matmul_all_reduce", "cpu", torch.float32, **special) == "special"
    for other in ({"mode": "int8-wire"}, {"group": "ThreadGroup"}, {"elements": 5}, {"turns": 1}):
        assert select.select("matmul_all_reduce", "cpu", torch.float32, **(special | other)) == "rest"
    x = torch.zeros(1)
    assert select.select_for("matmul_all_reduce", x, SingleGroup(), 6, "plain", 2) == "special"
    assert select.select_for("matmul_all_reduce", x, SingleGroup(), 6, "plain", 1) == "rest"
