"""`matmul_all_reduce`: each mode against the contract's formula, its gradients, its collectives, its bits.

The reference is `tests.kernels.calls`: the formula in float64 numpy. The refusals are in `test_operands`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels import calls
from tests.kernels.calls import Call, Case
from torch import Tensor

from shardwright.comm.group import Group
from shardwright.comm.planned import PlannedGroup
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.single import SingleGroup
from shardwright.errors import UnsupportedError
from shardwright.kernels.matmul_all_reduce import IMPLEMENTATIONS, matmul_all_reduce
from shardwright.kernels.quant import pack_int4
from shardwright.layout.partition import Partition
from shardwright.testing.ranks import on_gloo, on_processes, on_threads

MODES = {
    "plain": calls.plain(),
    "weight-quant": calls.weight_quant(),
    "full-quant": calls.full_quant(per_token=False, wire=False),
    "per-token": calls.full_quant(per_token=True, wire=False),
}
FEW = settings(deadline=None, max_examples=200, derandomize=True)


def body(group: Group, arguments: list[Call]) -> Tensor:
    return matmul_all_reduce(group=group, **arguments[group.rank])


def outputs(case: Case) -> list[Tensor]:
    return on_threads(case.ranks, body, case.calls())


# ---- values


@pytest.mark.parametrize("mode", sorted(MODES))
@FEW
@given(data=st.data())
def test_every_mode_is_its_formula(mode: str, data: st.DataObject) -> None:
    case = data.draw(MODES[mode])
    calls.check_formula(case, outputs(case))


@FEW
@given(case=calls.full_quant(per_token=False, wire=True) | calls.full_quant(per_token=True, wire=True))
def test_int8_on_the_wire_is_the_emulation_bit_for_bit(case: Case) -> None:
    """Integers are exact, and every float32 rounding of the emulation is one of the code."""
    emulated = calls.over_int8(case.calls())
    for y in outputs(case):
        assert y.dtype == emulated.dtype
        assert torch.equal(y, emulated)


def test_int8_on_the_wire_rounds_halves_to_even_and_saturates() -> None:
    """With k = 1 and scale 1 the product is the partial sum; two ranks send it, and the total comes back."""
    products = [[1, 3, 5, 127], [-1, -3, -5, -128]]
    x1 = torch.tensor([[1], [-1]], dtype=torch.int8)
    call: Call = {
        "x1": x1,
        "x2": torch.tensor([[1, 3, 5, 127]], dtype=torch.int8),
        "dequant_scale": torch.ones(1, dtype=torch.bfloat16),
        "x3": torch.tensor([[0, 0, 0, 200], [0, 0, 0, -200]], dtype=torch.bfloat16),
        "comm_quant_scale_1": torch.full((4,), 2, dtype=torch.bfloat16),
        "comm_quant_scale_2": torch.full((4,), 2, dtype=torch.bfloat16),
    }
    assert products[0] == (x1.int() @ call["x2"].int())[0].tolist()
    (first, second) = on_threads(2, body, [call, call])
    # 0.5, 1.5, 2.5 and 163.5 go as 0, 2, 2 and 127, the end of the range; so does twice 127, on the way back.
    assert first.tolist() == [[0, 8, 8, 254], [0, -8, -8, -256]]
    assert torch.equal(first, second)


def test_int8_products_are_exact_beyond_what_float32_counts() -> None:
    """1041 products of 127 by 127 sum to 2²⁴ + 13073, an odd number that float32 does not have; the bias leaves 9."""
    x1, x2 = torch.full((1, 1041), 127, dtype=torch.int8), torch.full((1041, 1), 127, dtype=torch.int8)
    bias, one = torch.tensor([9 - 1041 * 127 * 127], dtype=torch.int32), torch.ones(1, dtype=torch.bfloat16)
    assert matmul_all_reduce(x1, x2, SingleGroup(), bias=bias, dequant_scale=one).tolist() == [[9.0]]


def check_wire(group: Group) -> bool:
    case = Case((5,), (3, 0, 7), 5, torch.int8, scale="packed", per_token=True, wire=True, bias=True, x3=True)
    return torch.equal(body(group, case.calls()), calls.over_int8(case.calls()))


@pytest.mark.parametrize("run", [on_threads, on_processes, on_gloo], ids=["threads", "shared_memory", "gloo"])
def test_int8_on_the_wire_has_these_bits_on_every_kind_of_group(run: Callable[..., list[bool]]) -> None:
    """Nothing but integers moves, so gloo has no say in the order of a sum."""
    assert run(3, check_wire) == [True] * 3


def test_bias_and_x3_count_once_a_rank_that_passes_them() -> None:
    """They are added before the reduce: 3 ranks of 1 x 1 + 1 + 1, in a quantised mode too."""
    one, eight = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.int8)
    plain = {"x1": one, "x2": one, "bias": torch.ones(1), "x3": one}
    full = {"x1": eight, "x2": eight, "bias": torch.ones(1, dtype=torch.int32), "x3": one.half()}
    full["dequant_scale"] = torch.from_numpy(calls.packed_by_hand(np.ones(1)))
    for call in (plain, full):
        assert [y.item() for y in on_threads(3, body, [call] * 3)] == [9.0] * 3
        alone = {name: x for name, x in call.items() if name not in ("bias", "x3")}
        assert [y.item() for y in on_threads(3, body, [call, alone, alone])] == [5.0] * 3


@pytest.mark.parametrize("packed", ["n", "k"])
def test_int4_words_mean_the_same_in_any_memory_order(packed: str) -> None:
    """Which dim is packed is told by x1's k; a copy in another order gives the same, but for the order of its sums."""
    case = Case((3,), (16,), 8, torch.float32, packed=packed)
    (call,) = case.calls()
    copies = [call["x2"].contiguous(), call["x2"].T.contiguous().T, calls.every_other(call["x2"])]
    results = [matmul_all_reduce(group=SingleGroup(), **(call | {"x2": x2})) for x2 in copies]
    for y in results:  # 16 products in float32
        torch.testing.assert_close(y, results[0], rtol=1e-6, atol=1e-6 * float(results[0].abs().max()))


@pytest.mark.parametrize("scale", ["tensor", "column"])
def test_a_rank_without_rows_of_int4_words_enters_the_reduce(scale: str) -> None:
    """k_r = 0 fits both packings: 13 columns are told by their scale, or by the strides of a slice's view."""
    case = Case((3,), (0, 8), 13, torch.float32, scale=scale, packed="k")
    value, _ = calls.expected(case.calls(), case.n)
    for y in outputs(case):
        np.testing.assert_allclose(y.double(), value, atol=1e-5)


def test_a_scale_of_uint64_is_read_like_one_of_int64() -> None:
    case = Case((3,), (4,), 5, torch.int8, scale="packed")
    (call,) = case.calls()
    unsigned = call | {"dequant_scale": call["dequant_scale"].view(torch.uint64)}
    assert torch.equal(
        matmul_all_reduce(group=SingleGroup(), **call), matmul_all_reduce(group=SingleGroup(), **unsigned)
    )


@pytest.mark.parametrize("dtype", [torch.float32, *calls.HALVES])
def test_equal_bits_on_all_ranks_and_in_two_runs(dtype: torch.dtype) -> None:
    case = Case((5,), (11, 0, 7, 3), 13, dtype, scale="none", bias=True, x3=True)
    first, second = outputs(case), outputs(case)
    assert all(torch.equal(y, first[0]) for y in first + second)


def test_inputs_are_left_as_they_were() -> None:
    for case in (
        Case((3,), (7,), 5, torch.float32, scale="none", bias=True, x3=True),
        Case((3,), (7,), 5, torch.float32, offset=True),
        Case((3,), (7,), 5, torch.int8, scale="float32", per_token=True, wire=True, bias=True, x3=True),
    ):
        (call,) = case.calls()
        before = {name: x.clone() for name, x in call.items() if isinstance(x, Tensor)}
        matmul_all_reduce(group=SingleGroup(), **call)
        assert all(torch.equal(call[name], x) for name, x in before.items())


# ---- what moves


@pytest.mark.parametrize(("mode", "case"), [
    ("plain", Case((2, 3), (7,), 5, torch.bfloat16, scale="none")),
    ("weight-quant", Case((2, 3), (7,), 8, torch.bfloat16, packed="n", offset=True)),
    ("weight-quant", Case((2, 3), (70,), 5, torch.bfloat16, scale="group", group_size=32)),
    ("full-quant", Case((2, 3), (7,), 5, torch.int8, scale="bfloat16", bias=True)),
    ("per-token", Case((2, 3), (7,), 5, torch.int8, scale="float32", per_token=True, x3=True)),
])  # fmt: skip
def test_on_meta_tensors_shapes_flow_and_one_all_reduce_is_counted(mode: str, case: Case) -> None:
    group = RecordingGroup(PlannedGroup(1, 4))
    y = matmul_all_reduce(group=group, **on_meta(case.calls()[0]), tag="here")
    assert (y.shape, y.device.type, y.element_size()) == ((2, 3, case.n), "meta", 2)
    assert [(c.op, c.bytes, c.tag) for c in group.calls] == [("all_reduce", 2 * y.numel(), "here")], mode


def test_int8_on_the_wire_moves_one_byte_an_element_on_either_leg() -> None:
    """6 rows of 5 columns over 4 ranks are padded to 8: all of them out, this rank's 2 back."""
    group = RecordingGroup(PlannedGroup(1, 4))
    case = Case((2, 3), (7,), 5, torch.int8, scale="bfloat16", wire=True)
    y = matmul_all_reduce(group=group, **on_meta(case.calls()[0]), tag="here")
    assert (y.shape, y.dtype) == ((2, 3, 5), torch.bfloat16)
    moved = [(c.op, c.bytes, c.dtype, c.tag) for c in group.calls]
    assert moved == [("all_to_all", 40, "int8", "here"), ("all_gather", 10, "int8", "here")]


def on_meta(call: Call) -> Call:
    return {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in call.items()}


def test_the_table_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the table names gets the checked operands and the group, with gradients asked for and without."""
    seen: list[Any] = []

    def double(operands: Any, group: Group) -> Tensor:
        seen.append((operands.mode, operands.turns, operands.tag, group.size))
        return torch.ones(operands.shape)

    for name in ("reference", "chunked"):
        monkeypatch.setitem(IMPLEMENTATIONS, name, double)
    x1, x2 = torch.zeros(2, 3), torch.zeros(3, 4)
    assert matmul_all_reduce(x1, x2, SingleGroup(), comm_turn=3, tag="t").tolist() == [[1.0] * 4] * 2
    assert matmul_all_reduce(x1, x2.requires_grad_(), SingleGroup()).requires_grad
    assert seen == [("plain", 3, "t", 1), ("plain", 0, "", 1)]


# ---- gradients


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("rows", [(3,), (2, 2), (0,)])
def test_plain_gradients_by_finite_differences(rows: tuple[int, ...]) -> None:
    """Float64: central differences agree to 1e-6 relative where the function is bilinear."""

    def function(x1: Tensor, x2: Tensor, bias: Tensor, x3: Tensor) -> Tensor:
        return matmul_all_reduce(x1, x2.T, SingleGroup(), bias=bias, x3=x3)

    assert torch.autograd.gradcheck(function, leaves((*rows, 5), (4, 5), (4,), (*rows, 4)))


def quantised_weight(k: int, n: int) -> Call:
    integers = torch.randint(-8, 8, (k, n), generator=torch.Generator().manual_seed(1))
    scale = torch.rand(1, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return {"x2": pack_int4(integers), "antiquant_scale": scale, "antiquant_offset": scale / 2}


def test_weight_quant_gradients_by_finite_differences() -> None:
    def function(x1: Tensor, bias: Tensor, x3: Tensor) -> Tensor:
        return matmul_all_reduce(x1, group=SingleGroup(), bias=bias, x3=x3, **quantised_weight(5, 8))

    assert torch.autograd.gradcheck(function, leaves((3, 5), (8,), (3, 8)))


def check_gradients(group: Group, rows: tuple[int, ...], widths: list[int], quantised: bool) -> None:
    """Against the unsharded twin; float64 to another order of summation. bias and x3 go in on rank 0 only."""
    n = 8
    x1, bias, x3, weight = leaves((*rows, sum(widths)), (n,), (*rows, n), (n, sum(widths)))
    start, stop = Partition.explicit(widths).range(group.rank)
    parameters: Call = {}
    if quantised:
        parameters = quantised_weight(sum(widths), n)
        twin = torch.from_numpy(calls.weight({"x1": x1, **parameters, "antiquant_group_size": 0}, n))
        parameters["x2"] = parameters["x2"][start:stop]
    else:
        twin = weight.T
    (x1 @ twin + bias + x3).sin().sum().backward()
    mine = [x.detach().clone().requires_grad_() for x in (x1[..., start:stop], bias, x3, weight[:, start:stop])]
    if not quantised:
        parameters["x2"] = mine[3].T
    recorder = RecordingGroup(group)
    first: Call = {"bias": mine[1], "x3": mine[2]} if group.rank == 0 else {}
    y = matmul_all_reduce(mine[0], group=recorder, **parameters, **first)
    y.sin().sum().backward()
    expected = [x1.grad[..., start:stop], bias.grad, x3.grad]  # type: ignore[index]
    expected += [] if quantised else [weight.grad[:, start:stop]]  # type: ignore[index]
    for ours, theirs in zip(mine, expected, strict=False):
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs, rtol=0, atol=1e-12)
    assert [x.grad is not None for x in mine] == [True, *[group.rank == 0] * 2, not quantised]
    assert [call.op for call in recorder.calls] == ["all_reduce"]


@pytest.mark.parametrize("quantised", [False, True], ids=["plain", "weight-quant"])
@pytest.mark.parametrize("rows", [(4,), (0,), (2, 3)])
@pytest.mark.parametrize("widths", [[7], [0, 7], [3, 0, 4, 0], [1, 1, 2, 1, 1]])
def test_gradients_equal_the_unsharded_ones_and_move_nothing(
    rows: tuple[int, ...], widths: list[int], quantised: bool
) -> None:
    on_threads(len(widths), check_gradients, rows, widths, quantised)


def test_a_second_derivative_is_refused() -> None:
    x1, x2 = leaves((3, 5), (5, 4))
    y = matmul_all_reduce(x1, x2, SingleGroup()).pow(3).sum()
    (gradient,) = torch.autograd.grad(y, x1, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


QUANTISED = Case((3,), (7,), 5, torch.float32, offset=True)
INTEGERS = Case((3,), (7,), 5, torch.int8, scale="float32", per_token=True, wire=True, x3=True)


@pytest.mark.parametrize(("case", "name", "why"), [
    (QUANTISED, "antiquant_scale", "x1, bias and x3 have gradients, a quantised weight has none"),
    (QUANTISED, "antiquant_offset", "x1, bias and x3 have gradients, a quantised weight has none"),
    *((INTEGERS, name, "int8 by int8 is for inference and has no gradients") for name in
      ("dequant_scale", "pertoken_scale", "comm_quant_scale_1", "comm_quant_scale_2", "x3")),
])  # fmt: skip
def test_a_gradient_that_is_not_defined_is_refused(case: Case, name: str, why: str) -> None:
    (call,) = case.calls()
    call[name].requires_grad_()
    with pytest.raises(UnsupportedError, match=f"{name}=requires_grad: {why}; detach it, or call under torch.no_grad"):
        matmul_all_reduce(group=SingleGroup(), **call)
    with torch.no_grad():
        matmul_all_reduce(group=SingleGroup(), **call)
