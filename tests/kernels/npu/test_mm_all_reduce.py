"""The Ascend kernel against a recorded contract: never run on such a device.

Values are computed by the fake, so what is tested is that every argument arrives as documented, on processes over gloo
with another oracle (float64, whole numbers where a rounding would decide), and that nothing outside the device's limits
does arrive.
"""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.kernels.npu.recorded import RecordedTorchNpu
from torch import Tensor

from shardwright.comm.group import Group
from shardwright.comm.single import SingleGroup
from shardwright.comm.torch_group import TorchGroup
from shardwright.errors import UnsupportedError
from shardwright.kernels import fused_reference
from shardwright.kernels.npu.mm_all_reduce import CARDS, MOST, npu_mm_all_reduce
from shardwright.kernels.npu.mm_all_reduce import matmul_all_reduce as device_row
from shardwright.kernels.operands import Antiquant, Dequant, Given, Operands, check
from shardwright.kernels.select import select
from shardwright.testing.ranks import on_gloo

M, K, N, EXACT = 6, 64, 4, torch.float64


def whole(rank: int, *shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    """-2…2, so that sums are exact in every type."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(10 * seed + rank)).to(dtype)


def installed(patch: pytest.MonkeyPatch, group: Group, device: str = "Ascend910B2") -> RecordedTorchNpu:
    fake = RecordedTorchNpu({"hccl": group}, device)
    patch.setitem(sys.modules, "torch_npu", fake)
    patch.setattr(TorchGroup, "hccl_name", lambda self: "hccl")
    return fake


def packed(scale: Tensor) -> Tensor:
    return (scale.view(torch.int32).long() & 0xFFFFE000) | 1 << 46


def check_modes(group: Group, shape: list[int]) -> None:
    """Each mode of the contract, bias and x3 on every rank: summed once a rank."""
    ranks, me = range(group.size), group.rank
    half = torch.tensor([0.5, 1, 2, 0.25], dtype=torch.float32)
    x1, x2 = [whole(rank, *shape, K) for rank in ranks], [whole(rank, K, N, seed=1) for rank in ranks]
    bias, x3 = [whole(rank, N, seed=2) for rank in ranks], [whole(rank, *shape, N, seed=3) for rank in ranks]

    def total(of_rank: Any) -> Tensor:
        return torch.stack([of_rank(rank) for rank in ranks]).sum(0)

    with pytest.MonkeyPatch.context() as patch:
        fake = installed(patch, group)
        plain = total(lambda r: x1[r].to(EXACT) @ x2[r].to(EXACT) + bias[r] + x3[r])
        y = npu_mm_all_reduce(x1[me], x2[me].T.contiguous().T, group, bias=bias[me], x3=x3[me])
        assert torch.equal(y, plain.half())
        assert y.shape == (*shape, N)

        small = [weight.to(torch.int8) for weight in x2]
        offset = torch.ones(N, dtype=torch.float16)
        y = npu_mm_all_reduce(x1[me], small[me], group, antiquant_scale=half.half(), antiquant_offset=offset)
        expected = total(lambda r: x1[r].to(EXACT) @ ((small[r].to(EXACT) + 1) * half))
        assert torch.equal(y, expected.half())
        grouped = whole(0, 2, N, seed=4)
        y = npu_mm_all_reduce(x1[me], small[me], group, antiquant_scale=grouped, antiquant_group_size=32)
        scale = torch.cat([grouped[:1].expand(32, N), grouped[1:].expand(32, N)]).to(EXACT)
        assert torch.equal(y, total(lambda r: x1[r].to(EXACT) @ (small[r].to(EXACT) * scale)).half())

        bytes1, ints = [x.to(torch.int8) for x in x1], [x.to(torch.int32) for x in bias]
        product = [bytes1[r].to(EXACT) @ small[r].to(EXACT) + ints[r] for r in ranks]
        y = npu_mm_all_reduce(bytes1[me], small[me], group, bias=ints[me], dequant_scale=packed(half))
        assert torch.equal(y, total(lambda r: product[r] * half).half())
        scales: Any = {"dequant_scale": half, "pertoken_scale": torch.full((M,), 0.5), "x3": x3[me]}
        y = npu_mm_all_reduce(bytes1[me], small[me], group, bias=ints[me], **scales)
        assert torch.equal(y, total(lambda r: product[r] * half * 0.5 + x3[r]).half())
        first, second = torch.full((N,), 2.0).bfloat16(), torch.full((N,), 4.0).bfloat16()
        wire: Any = {"dequant_scale": half.bfloat16(), "comm_quant_scale_1": first, "comm_quant_scale_2": second}
        y = npu_mm_all_reduce(bytes1[me], small[me], group, **wire)
        exact = [bytes1[r].to(EXACT) @ small[r].to(EXACT) * half for r in ranks]
        on_wire = total(lambda r: (exact[r] / 2).round().clamp(-128, 127))
        assert torch.equal(y, ((on_wire / 2).round().clamp(-128, 127) * 4).bfloat16())
        assert [hcom for hcom, _ in fake.calls] == ["hccl"] * 6


@pytest.mark.parametrize("shape", [[M], [2, 3]])
def test_every_mode_arrives_as_documented(shape: list[int]) -> None:
    on_gloo(2, check_modes, shape)


class Imagined:
    """A process group of any size, which nothing is sent over."""

    group_name, _device_types = "imagined", [torch.device("cpu")]

    def __init__(self, size: int) -> None:
        self.size = lambda: size

    def rank(self) -> int:
        return 0


def cards(size: int) -> TorchGroup:
    group: Any = Imagined(size)
    return TorchGroup.of(group)


X1, X2 = torch.ones(M, K).half(), torch.ones(K, N).half()
INT1, INT2, SCALE = X1.to(torch.int8), X2.to(torch.int8), torch.ones(N).half()
LONG, BROAD = torch.ones(1, MOST + 1).half(), torch.ones(1, MOST + 1).to(torch.int8)
TRAINED = torch.ones(M, K).half().requires_grad_()


@pytest.mark.parametrize(("x1", "x2", "size", "options", "said"), [
    (X1, X2, 3, {}, r"3 cards, not one of \(1, 2, 4, 8\)"),
    (X1, X2, 16, {}, "16 cards"),
    (X1.float(), X2.float(), 2, {}, r"x1 is float32, not one of \['float16', 'bfloat16', 'int8'\]"),
    (X1[:0], X2, 2, {}, r"x1 \[0, 64\] is empty"),
    (LONG, BROAD.T, 2, {"antiquant_scale": SCALE[:1]}, "k is 65536, above 65535 with quantised operands"),
    (LONG.to(torch.int8), BROAD.T, 2, {"dequant_scale": SCALE[:1]}, "k is 65536"),
    (X1[:, :1], BROAD, 2, {"antiquant_scale": SCALE[:1]}, "n is 65536, above 65535 with a quantised weight"),
    (X1, X2, 2, {"comm_turn": 4}, r"comm_turn is 4, and the device cuts by itself \(0\)"),
    (TRAINED, X2, 2, {}, "the fused operator has no gradient"),
])  # fmt: skip
def test_nothing_outside_the_limits_reaches_the_device(
    monkeypatch: pytest.MonkeyPatch, x1: Tensor, x2: Tensor, size: int, options: dict[str, Any], said: str
) -> None:
    """Who asks for this kernel is refused; who leaves the choice open gets the unfused path, and is told."""
    group, seen = cards(size), []

    def unfused(*arguments: Any, **keywords: Any) -> Tensor:
        seen.append((arguments, keywords))
        return torch.zeros(1)

    fake = installed(monkeypatch, SimpleNamespace(size=size))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=f"npu_mm_all_reduce: {said}.*; leave the choice"):
        npu_mm_all_reduce(x1, x2, group, **options)
    with pytest.warns(UserWarning, match=f"{said}.*; multiplying and communicating one after the other"):
        assert npu_mm_all_reduce(x1, x2, group, tag="t", unfused=unfused, **options).shape == (1,)
    assert seen == [((x1, x2, group), {"tag": "t", **options})]
    assert not fake.calls
    if x1 is not TRAINED:
        with pytest.raises(RuntimeError):
            fake.npu_mm_all_reduce_base(x1, x2, "hccl", **options)


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(UnsupportedError, match="torch_npu is not installed"):
        npu_mm_all_reduce(X1, X2, cards(2))
    with pytest.raises(UnsupportedError, match="a SingleGroup has no HCCL communicator"):
        npu_mm_all_reduce(X1, X2, SingleGroup())
    installed(monkeypatch, SingleGroup(), "Ascend310P3")
    with pytest.raises(UnsupportedError, match=r"Ascend310P3 is not of the Atlas A2 series \(Ascend910B…\)"):
        npu_mm_all_reduce(X1, X2, cards(2))


@pytest.mark.parametrize("size", CARDS)
def test_each_number_of_cards_is_served(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    fake = installed(monkeypatch, SimpleNamespace(size=size, all_reduce=lambda y: size * y))  # type: ignore[arg-type]
    assert torch.equal(npu_mm_all_reduce(X1, X2, cards(size)), torch.full((M, N), float(size * K)).half())
    assert len(fake.calls) == 1


@pytest.mark.parametrize(("x1", "x2", "options", "said"), [
    (X1, X2[None], {}, "x2 is 2-D"),
    (X1[:, 1:], X2, {}, "k differs"),
    (X1, X2, {"reduce_op": "max"}, "only sum"),
    (INT1, INT2, {"antiquant_scale": SCALE}, "antiquant with int8 x int8"),
    (X1, INT2, {"dequant_scale": SCALE}, "dequant_scale with a float x1"),
    (X1, X2, {"antiquant_scale": SCALE}, "quantised inputs with float x float"),
    (X1, X2, {"antiquant_offset": SCALE}, "quantised inputs with float x float"),
    (X1, X2, {"x3": SCALE}, "x3 of another shape"),
    (X1, X2, {"x3": torch.zeros(M, N)}, "x3 of another type"),
    (INT1, INT2, {"pertoken_scale": torch.ones(M)}, "pertoken_scale without dequant_scale"),
    (INT1, INT2, {"dequant_scale": SCALE, "comm_quant_scale_1": SCALE}, "one of the two comm scales alone"),
])  # fmt: skip
def test_what_breaks_the_contract_is_the_operators_to_refuse(
    monkeypatch: pytest.MonkeyPatch, x1: Tensor, x2: Tensor, options: dict[str, Any], said: str
) -> None:
    """This kernel passes it on; `kernels.matmul_all_reduce` checks before any kernel is chosen."""
    installed(monkeypatch, SimpleNamespace(size=2))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=said):
        npu_mm_all_reduce(x1, x2, cards(2), **options)


def check_row_of_the_table(group: Group) -> None:
    """The operator's own operands arrive at the device by their published names, in every mode.

    Reference: the table's own over the same call, whole numbers, so exact.
    """
    me, n = group.rank, (N,)
    half, scale = torch.tensor([0.5, 1, 2, 0.25]), whole(0, N, seed=4).abs() + 1
    x1, bias, x3 = whole(me, M, K), whole(me, N, seed=2), whole(me, M, N, seed=3)
    small = whole(me, K, N, seed=1, dtype=torch.int8)
    ints = {"bias": bias.int(), "dequant_scale": packed(half)}
    calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = [
        (x1, small.half(), {"bias": bias, "x3": x3}),
        (x1, small, {"antiquant_scale": scale, "antiquant_offset": scale, "bias": bias}),
        (x1, small, {"antiquant_scale": scale.expand(2, *n).contiguous(), "antiquant_group_size": 32}),
        (x1.to(torch.int8), small, ints),
        (x1.to(torch.int8), small, {"dequant_scale": half, "pertoken_scale": torch.ones(M)}),
    ]
    for first, second, options in calls:
        with pytest.MonkeyPatch.context() as patch:
            fake = installed(patch, group)
            operands = check_call(first, second, **options)
            found = device_row(operands, group)
            assert torch.equal(found, fused_reference.matmul_all_reduce(operands, group))
            ((_, given),) = fake.calls
            assert {name: value for name, value in given.items() if value is not None and name in options} == options


def check_call(x1: Tensor, x2: Tensor, **options: Any) -> Operands:
    antiquant = Antiquant(*(options.get(f"antiquant_{name}") for name in ("scale", "offset")))
    antiquant = antiquant._replace(group_size=options.get("antiquant_group_size", 0))
    dequant = Dequant(options.get("dequant_scale"), options.get("pertoken_scale"))
    return check(Given(x1, x2, options.get("bias"), options.get("x3"), antiquant, dequant, "sum", 0, "x"))


def test_the_tables_row_hands_everything_over() -> None:
    on_gloo(2, check_row_of_the_table)


def test_the_table_leads_to_the_device() -> None:
    assert select("matmul_all_reduce", "npu", torch.float16, mode="plain", group="TorchGroup") == "npu"
    assert select("matmul_all_reduce", "npu", torch.float16, mode="plain", group="ThreadGroup") == "reference"
    assert select("matmul_all_reduce", "cuda", torch.float16, mode="plain", group="TorchGroup") == "symmetric"
    assert select("matmul_all_reduce", "cuda", torch.int8, mode="full-quant", group="TorchGroup") == "reference"
