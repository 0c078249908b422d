"""`chunked`: products in pieces, against the formulas, the whole's bits, and an account of what is under way when.

The reference is `tests.kernels.calls`, as for the operator itself.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels import calls
from tests.kernels.calls import Call, Case
from torch import Tensor

from shardwright.comm.group import Group, Handle
from shardwright.comm.planned import PlannedGroup
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.single import SingleGroup
from shardwright.kernels import chunked, fused_reference
from shardwright.kernels.matmul_all_reduce import IMPLEMENTATIONS, matmul_all_reduce
from shardwright.kernels.operands import Operands
from shardwright.kernels.siblings import matmul_all_reduce_add_rms_norm
from shardwright.testing.ranks import on_gloo, on_processes, on_threads

MODES = {
    "plain": calls.plain(),
    "weight-quant": calls.weight_quant(),
    "full-quant": calls.full_quant(per_token=False, wire=False),
    "per-token": calls.full_quant(per_token=True, wire=False),
}
WIRE = calls.full_quant(per_token=False, wire=True) | calls.full_quant(per_token=True, wire=True)
TURNS = st.sampled_from([1, 2, 3, 7, 50])
FEW = settings(deadline=None, max_examples=100, derandomize=True)

WIDE = [
    Case((5,), (7, 0, 11), 100, torch.float32, scale="none", bias=True, x3=True),
    Case((2, 50), (7, 0, 11), 9, torch.float32, scale="none", bias=True, x3=True, strided=True),
    Case((5,), (7, 11), 96, torch.bfloat16, packed="n", offset=True, transposed=True, bias=True),
    Case((5,), (70, 33), 100, torch.float32, scale="group", group_size=32, offset=True, x3=True),
    Case((10, 10), (70, 33), 9, torch.float64, scale="group", group_size=32, offset=True, x3=True),
    Case((5,), (7, 11), 100, torch.int8, scale="packed", bias=True, x3=True),
    Case((2, 50), (7, 11), 9, torch.int8, scale="float32", per_token=True, bias=True, x3=True),
]
"""Enough columns, or rows, that pieces end at whole blocks."""


def body(group: Group, arguments: list[Call], turns: int) -> Tensor:
    return matmul_all_reduce(group=group, **arguments[group.rank], comm_turn=turns)


def outputs(case: Case, turns: int) -> list[Tensor]:
    return on_threads(case.ranks, body, case.calls(), turns)


# ---- values


@pytest.mark.parametrize("mode", sorted(MODES))
@FEW
@given(data=st.data(), turns=TURNS)
def test_every_mode_is_its_formula_in_any_number_of_pieces(mode: str, data: st.DataObject, turns: int) -> None:
    case = data.draw(MODES[mode])
    calls.check_formula(case, outputs(case, turns))


@pytest.mark.parametrize("turns", [2, 3])
@pytest.mark.parametrize("case", WIDE)
def test_pieces_that_end_at_whole_blocks_are_the_formula_too(case: Case, turns: int) -> None:
    calls.check_formula(case, outputs(case, turns))


@FEW
@given(case=WIRE, turns=TURNS)
def test_int8_on_the_wire_is_the_emulation_bit_for_bit(case: Case, turns: int) -> None:
    """Both legs of each piece round where the whole would."""
    emulated = calls.over_int8(case.calls())
    assert all(torch.equal(y, emulated) for y in outputs(case, turns))


@FEW
@given(case=MODES["full-quant"] | MODES["per-token"], turns=TURNS)
def test_integer_products_have_the_references_bits(case: Case, turns: int) -> None:
    """Their products are exact in any cut, and what follows is done element by element."""
    whole = outputs(case, 0)
    assert all(torch.equal(y, whole[0]) for y in outputs(case, turns))


def test_inputs_are_left_as_they_were() -> None:
    for case in (*WIDE, Case((5,), (7,), 40, torch.int8, scale="float32", wire=True, per_token=True, x3=True)):
        call = case.calls()[0]
        before = {name: x.clone() for name, x in call.items() if isinstance(x, Tensor)}
        matmul_all_reduce(group=SingleGroup(), **call, comm_turn=3)
        assert all(torch.equal(call[name], x) for name, x in before.items())


KINDS = [
    Case((5,), (3, 0, 7), 40, torch.float32, scale="none", bias=True, x3=True),
    Case((2, 20), (3, 0, 7), 5, torch.float32, scale="none", bias=True),
    Case((5,), (3, 0, 7), 40, torch.bfloat16, packed="n", bias=True),
    Case((0,), (3, 0, 7), 5, torch.float32, scale="none"),
    Case((5,), (3, 0, 7), 40, torch.int8, scale="packed", bias=True, x3=True),
    Case((5,), (3, 0, 7), 40, torch.int8, scale="packed", per_token=True, wire=True, bias=True, x3=True),
]


def check_kinds(group: Group) -> list[list[float]]:
    """The norm, too. What every rank returns is compared by the caller."""
    found = []
    for case in KINDS:
        y = body(group, case.calls(), 3)
        if case.wire:
            assert torch.equal(y, calls.over_int8(case.calls()))
        else:
            calls.check_formula(case, [y])
        found.append(y.flatten().tolist())
    call = {name: x for name, x in KINDS[0].calls()[group.rank].items() if name != "x3"}
    residual, gamma = torch.ones(5, 40), torch.full((40,), 2.0)
    norm, y = matmul_all_reduce_add_rms_norm(
        residual=residual, gamma=gamma, group=group, comm_turn=3, **call, tag="norm"
    )
    whole = matmul_all_reduce_add_rms_norm(residual=residual, gamma=gamma, group=group, **call, tag="norm")
    torch.testing.assert_close((norm, y), whole, rtol=1e-5, atol=1e-5)  # some roundings of float32
    group.end_step()
    return found


@pytest.mark.parametrize("run", [on_threads, on_processes, on_gloo], ids=["threads", "shared_memory", "gloo"])
def test_every_kind_of_group(run: Callable[..., list[Any]]) -> None:
    """All ranks hold the same bits."""
    found = run(3, check_kinds)
    assert found == [found[0]] * 3


# ---- what moves


@pytest.mark.parametrize(("case", "turns", "shapes"), [
    (Case((5,), (7,), 96, torch.float32, scale="none"), 1, [[5, 96]]),
    (Case((5,), (7,), 96, torch.float32, scale="none"), 4, [[5, 32], [5, 32], [5, 16], [5, 16]]),
    (Case((5,), (7,), 96, torch.float32), 40, [[5, 3]] * 16 + [[5, 2]] * 24),
    (Case((3,), (7,), 5, torch.float32, scale="none"), 9, [[3, 1]] * 5),
    (Case((5,), (7,), 24, torch.float32, packed="n"), 2, [[5, 16], [5, 8]]),
    (Case((5,), (7,), 24, torch.float32, packed="n"), 50, [[5, 8]] * 3),
    (Case((2, 32), (7,), 5, torch.bfloat16, packed="", offset=True), 3, [[32, 5], [16, 5], [16, 5]]),
    (Case((6,), (7,), 5, torch.int8, scale="float32", per_token=True), 50, [[1, 5]] * 6),
    (Case((0,), (7,), 5, torch.float32, scale="none"), 2, [[0, 3], [0, 2]]),
])  # fmt: skip
def test_n_pieces_are_n_collectives_of_as_many_bytes_in_sum(case: Case, turns: int, shapes: list[list[int]]) -> None:
    """Along the longer of m and n, at whole blocks of 16, or words of 8, where there are enough."""
    group = RecordingGroup(SingleGroup())
    y = matmul_all_reduce(group=group, **case.calls()[0], comm_turn=turns, tag="here")
    assert [(c.op, c.detail, c.tag) for c in group.calls] == [("all_reduce", f"shape {s}", "here") for s in shapes]
    assert sum(call.bytes for call in group.calls) == y.numel() * y.element_size()


def check_wire_moves(group: Group, case: Case) -> None:
    recorder = RecordingGroup(group)
    for turns in (0, 3):
        body(recorder, case.calls(), turns)
    whole, cut = recorder.calls[:2], recorder.calls[2:]
    assert Counter(call.op for call in cut) == {"all_to_all": 3, "all_gather": 3}
    for leg in whole:
        assert sum(call.bytes for call in cut if call.op == leg.op) == leg.bytes


@pytest.mark.parametrize("rows", [(5,), (50,)])
def test_int8_on_the_wire_moves_the_same_bytes_on_each_leg(rows: tuple[int, ...]) -> None:
    """Cut along n though there are more rows, since each piece would pad its own."""
    case = Case(rows, (3, 0, 7), 6, torch.int8, scale="packed", wire=True)
    on_threads(3, check_wire_moves, case)


def test_on_meta_tensors_the_collectives_are_counted() -> None:
    group = RecordingGroup(PlannedGroup(1, 4))
    x1, x2 = torch.empty(2, 3, 7, device="meta"), torch.empty(7, 64, device="meta")
    assert matmul_all_reduce(x1, x2, group, comm_turn=4).shape == (2, 3, 64)
    assert [(call.op, call.bytes) for call in group.calls] == [("all_reduce", 6 * 16 * 4)] * 4


# ---- what is under way when


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Products, and collectives begun and ended, in the order in which they happen on this one rank."""
    events: list[str] = []
    begin, end = Group._issue, Group.retire
    names: dict[int, str] = {}

    def begun(self: Group, handle: Handle) -> Handle:
        names[id(handle)] = f"{handle.call.op} {len([e for e in events if e.startswith(f'begin {handle.call.op}')])}"
        events.append(f"begin {names[id(handle)]}")
        return begin(self, handle)

    def ended(self: Group, handle: Handle, seconds: float) -> None:
        events.append(f"end {names[id(handle)]}")
        end(self, handle, seconds)

    def noted(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            events.append("product")
            return product(*arguments)

        return run

    monkeypatch.setattr(Group, "_issue", begun)
    monkeypatch.setattr(Group, "retire", ended)
    for name in ("partial", "dequantised"):
        monkeypatch.setattr(fused_reference, name, noted(getattr(fused_reference, name)))
    return events


def test_a_piece_is_under_way_while_the_next_one_multiplies(log: list[str]) -> None:
    matmul_all_reduce(torch.ones(2, 3), torch.ones(3, 8), SingleGroup(), comm_turn=3)
    assert log == [
        "product", "begin all_reduce 0",
        "product", "begin all_reduce 1", "end all_reduce 0",
        "product", "begin all_reduce 2", "end all_reduce 1",
        "end all_reduce 2",
    ]  # fmt: skip


def test_each_leg_of_int8_on_the_wire_has_a_product_to_hide_behind(log: list[str]) -> None:
    (call,) = Case((5,), (7,), 8, torch.int8, scale="packed", wire=True).calls()
    matmul_all_reduce(group=SingleGroup(), **call, comm_turn=3)
    assert log == [
        "product", "begin all_to_all 0",
        "product", "begin all_to_all 1", "end all_to_all 0", "begin all_gather 0",
        "product", "begin all_to_all 2", "end all_gather 0", "end all_to_all 1", "begin all_gather 1",
        "end all_gather 1", "end all_to_all 2", "begin all_gather 2",
        "end all_gather 2",
    ]  # fmt: skip


# ---- the cost rule


@pytest.mark.parametrize(("shape", "dtype", "turns"), [
    ((1, 8192), torch.float32, 1),
    ((512, 8192), torch.float32, 4),
    ((1024, 8192), torch.float32, 8),
    ((1024, 8192), torch.bfloat16, 4),
])  # fmt: skip
def test_the_rule_makes_pieces_of_four_mebibytes(shape: tuple[int, int], dtype: torch.dtype, turns: int) -> None:
    x = torch.empty(0)
    assert chunked.turns_for(Operands(x, x, None, None, None, dtype, shape, 0, "")) == turns


def chosen(group: Group, widths: list[int], rows: int, wire: bool) -> list[str]:
    """What each rank enters where the rule decides; k differs from rank to rank."""
    dtype, scale = (torch.int8, "packed") if wire else (torch.float32, "none")
    case = Case((rows,), tuple(widths), 64, dtype, scale=scale, wire=wire)
    recorder = RecordingGroup(group)
    body(recorder, case.calls(), 0)
    return [call.op for call in recorder.calls]


def test_all_ranks_come_to_one_number_whatever_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "PIECE", 1024)
    monkeypatch.setitem(IMPLEMENTATIONS, "reference", chunked.matmul_all_reduce)
    for rows, wire, expected in ((4, False, ["all_reduce"]), (16, False, ["all_reduce"] * 4), (32, True, None)):
        found = on_threads(3, chosen, [0, 1, 300], rows, wire)
        assert found == [found[0]] * 3
        assert Counter(found[0]) == Counter(expected or ["all_to_all", "all_gather"] * 2)


# ---- gradients


def gradients(group: Group, rows: tuple[int, ...], turns: int) -> list[Tensor]:
    (call,) = Case(rows, (7,), 40, torch.float64, scale="none", bias=True, x3=True, seed=group.rank).calls()
    leaves = {name: x.requires_grad_() for name, x in call.items()}
    recorder = RecordingGroup(group)
    y = matmul_all_reduce(group=recorder, comm_turn=turns, **leaves)
    moved = len(recorder.calls)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    assert len(recorder.calls) == moved == max(turns, 1)
    return [x.grad for x in leaves.values() if x.grad is not None]


@pytest.mark.parametrize("rows", [(4,), (2, 30)])
def test_gradients_are_those_of_the_whole_bit_for_bit(rows: tuple[int, ...]) -> None:
    """They do not depend on how the forward was cut, and move nothing."""
    whole, cut = (on_threads(3, gradients, rows, turns) for turns in (0, 2))
    for mine, theirs in zip(whole, cut, strict=True):
        assert len(mine) == 4
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_gradients_of_the_norm_are_those_of_the_whole() -> None:
    """To float64's rounding, as its products are cut; in as many collectives as pieces."""
    found = []
    for turns in (0, 3):
        inputs = [torch.linspace(-1, 1, n, dtype=torch.float64).view(s).requires_grad_()
                  for n, s in ((28, (4, 7)), (280, (7, 40)), (160, (4, 40)), (40, (40,)))]  # fmt: skip
        group = RecordingGroup(SingleGroup())
        norm, y = matmul_all_reduce_add_rms_norm(*inputs, group, comm_turn=turns)
        assert [call.op for call in group.calls] == ["all_reduce"] * max(turns, 1)
        (norm.sin() + y.cos()).sum().backward()
        found.append([x.grad for x in inputs])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
