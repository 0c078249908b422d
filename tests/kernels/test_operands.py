"""Every refusal of the published contract, by its words; and that what the contract allows is told apart by mode.

A refusal names the attribute, its value, the constraint and a remedy. All happen before anything is computed or moved.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.comm.planned import PlannedGroup
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.single import SingleGroup
from shardwright.errors import UnsupportedError, UsageError
from shardwright.kernels.matmul_all_reduce import matmul_all_reduce
from shardwright.kernels.operands import Antiquant, Dequant, Given, Mode, check

M, K, N = 4, 70, 5


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def eight(*shape: int) -> Tensor:
    return zeros(*shape, dtype=torch.int8)


X1, X2, W8, Q1 = zeros(M, K), zeros(K, N), eight(K, N), eight(M, K)
PACKED = zeros(N, dtype=torch.int64)
PLAIN: dict[str, Any] = {"x1": X1, "x2": X2}
WEIGHT: dict[str, Any] = {"x1": X1, "x2": W8, "antiquant_scale": zeros(N)}
FULL: dict[str, Any] = {"x1": Q1, "x2": W8, "dequant_scale": PACKED}
TOKEN: dict[str, Any] = FULL | {"dequant_scale": zeros(N), "pertoken_scale": zeros(M)}
SCALE = zeros(N).half()
WIRE: dict[str, Any] = FULL | {"comm_quant_scale_1": SCALE, "comm_quant_scale_2": SCALE}


def words(*shape: int) -> Tensor:
    return zeros(*shape, dtype=torch.int32)


def group(size: int, rows: int) -> dict[str, Any]:
    return {"antiquant_group_size": size, "antiquant_scale": zeros(rows, N)}


CALL = [
    (PLAIN, {"reduce_op": "max"}, "reduce_op=max: only a sum distributes over the split matmul; use 'sum'"),
    (PLAIN, {"comm_turn": -1}, "comm_turn=-1: the number of chunks, or 0; use 0 to let it be chosen"),
    (PLAIN, {"x2": X2[0]}, r"x2=\[5\]: x2 is \[k, n\]; flatten"),
    (PLAIN, {"x2": X2[None]}, r"x2=\[1, 70, 5\]: x2 is \[k, n\]; flatten"),
    (PLAIN, {"x1": X1[0]}, r"x1=\[70\]: x1 is \[m, k\] or \[b, s, k\]; flatten"),
    (PLAIN, {"x1": X1[None, None]}, r"x1=\[1, 1, 4, 70\]: x1 is \[m, k\] or \[b, s, k\]; flatten"),
    (PLAIN, {"x1": X1[:, 1:]}, r"x1=\[4, 69\]: x1 is .* with k = 70; match x2's rows"),
    (WEIGHT, {"x1": X1[:, 1:]}, r"x1=\[4, 69\]: x1 is .* with k = 70; match x2's rows"),
    (FULL, {"x1": Q1[:, 1:]}, r"x1=\[4, 69\]: x1 is .* with k = 70; match x2's rows"),
    (PLAIN, {"x2": X2.half()}, "x2=float16: x1 is float32; convert one of them"),
    (PLAIN, {"bias": zeros(4)}, r"bias=float32 \[4\]: bias is float32 \[5\]; pass one"),
    (PLAIN, {"bias": zeros(1, N)}, r"bias=float32 \[1, 5\]: bias is float32 \[5\]; pass one"),
    (PLAIN, {"bias": zeros(N).half()}, r"bias=float16 \[5\]: bias is float32 \[5\]"),
    (PLAIN, {"x3": zeros(N)}, r"x3=float32 \[5\]: x3 is like the output, float32 \[4, 5\]; pass one like that"),
    (PLAIN, {"x3": zeros(M, N).double()}, r"x3=float64 \[4, 5\]: x3 is like the output, float32 \[4, 5\]"),
    (WEIGHT, {"bias": zeros(N).half()}, r"bias=float16 \[5\]: bias is float32 \[5\]"),
    (WEIGHT, {"x3": zeros(N, M)}, r"x3=float32 \[5, 4\]: x3 is like the output, float32 \[4, 5\]"),
    (FULL, {"bias": zeros(N)}, r"bias=float32 \[5\]: bias is int32 \[5\]"),
    (FULL, {"x3": zeros(M, N)}, r"x3=float32 \[4, 5\]: x3 is like the output, float16 \[4, 5\]"),
    (TOKEN, {"x3": zeros(M, N).bfloat16()}, r"x3=bfloat16 \[4, 5\]: x3 is like the output, float16 \[4, 5\]"),
]
QUANTISERS = [
    (
        PLAIN,
        {"antiquant_scale": zeros(N)},
        r"antiquant_scale=float32 \[5\]: x1 and x2 are float32, so nothing is quant",
    ),
    (PLAIN, {"antiquant_offset": zeros(N)}, r"antiquant_offset=float32 \[5\]: x1 and x2 are float32"),
    (PLAIN, {"antiquant_group_size": 32}, "antiquant_group_size=32: x1 and x2 are float32"),
    (PLAIN, {"dequant_scale": PACKED}, r"dequant_scale=int64 \[5\]: x1 and x2 are float32.*; leave it out, or pass"),
    (PLAIN, {"pertoken_scale": zeros(M)}, r"pertoken_scale=float32 \[4\]: x1 and x2 are float32"),
    (PLAIN, {"comm_quant_scale_1": SCALE, "comm_quant_scale_2": SCALE}, "comm_quant_scale_1=.*: x1 and x2 are float32"),
    (WEIGHT, {"dequant_scale": PACKED}, r"dequant_scale=int64 \[5\]: x1 is float32; this is for an int8 x1; use antiq"),
    (WEIGHT, {"pertoken_scale": zeros(M)}, r"pertoken_scale=float32 \[4\]: x1 is float32; this is for an int8 x1"),
    (WEIGHT, {"comm_quant_scale_1": SCALE, "comm_quant_scale_2": SCALE}, "comm_quant_scale_1=.*: x1 is float32; this"),
    (FULL, {"antiquant_scale": zeros(N)}, r"antiquant_scale=float32 \[5\]: x1 and x2 are int8; .*; use dequant_scale"),
    (FULL, {"antiquant_offset": zeros(N)}, r"antiquant_offset=float32 \[5\]: x1 and x2 are int8"),
    (FULL, {"antiquant_group_size": 32}, "antiquant_group_size=32: x1 and x2 are int8"),
    (
        WEIGHT,
        {"antiquant_scale": None},
        "antiquant_scale=None: an integer x2 under a floating x1 has one; pass its scale",
    ),
    (FULL, {"dequant_scale": None}, r"dequant_scale=None: int8 by int8 needs one; pass \[1\] or \[n\], see pack_deq"),
    (TOKEN, {"dequant_scale": None}, r"pertoken_scale=float32 \[4\]: it multiplies dequant_scale; pass dequant_scale"),
]
FORMS = [
    (
        WEIGHT,
        {"antiquant_scale": zeros(N).half()},
        r"antiquant_scale=float16 \[5\]: antiquant_scale is float32 \[1\] or",
    ),
    (
        WEIGHT,
        {"antiquant_scale": zeros(4)},
        r"antiquant_scale=float32 \[4\]: .* float32 \[1\] or \[5\] or \[1, 5\]; pass",
    ),
    (WEIGHT, {"antiquant_scale": zeros(3, N)}, r"antiquant_scale=float32 \[3, 5\]: .*\[1\] or \[5\] or \[1, 5\]"),
    (
        WEIGHT,
        {"antiquant_offset": zeros(1, N)},
        r"antiquant_offset=float32 \[1, 5\]: antiquant_offset is float32 \[5\]",
    ),
    (
        WEIGHT,
        {"antiquant_offset": zeros(N).half()},
        r"antiquant_offset=float16 \[5\]: antiquant_offset is float32 \[5\]",
    ),
    (WEIGHT, group(16, 5), r"antiquant_group_size=16: a multiple of 32 in \[32, k − 1\], k = 70; use a multiple of 32"),
    (WEIGHT, group(48, 2), "antiquant_group_size=48: a multiple of 32"),
    (WEIGHT, group(-32, 3), "antiquant_group_size=-32: a multiple of 32"),
    (WEIGHT, group(96, 1), r"antiquant_group_size=96: .*k = 70; use 0 and a scale for each column, which is one group"),
    (WEIGHT, group(64, 2) | {"x1": X1[:, :64], "x2": W8[:64]}, "antiquant_group_size=64: .*k = 64; use 0"),
    (WEIGHT, group(32, 2), r"antiquant_scale=float32 \[2, 5\]: antiquant_scale is float32 \[3, 5\]"),
    (WEIGHT, {"antiquant_group_size": 32}, r"antiquant_scale=float32 \[5\]: antiquant_scale is float32 \[3, 5\]"),
    (WEIGHT, {"x2": words(K - 1, 1)}, r"x2=int32 \[69, 1\]: int4 words are \[k, n/8\], or .* with k = 70; pack it"),
    (
        FULL,
        {"dequant_scale": zeros(N)},
        r"dequant_scale=float32 \[5\]: float32 goes with pertoken_scale only; use pack_",
    ),
    (
        FULL,
        {"dequant_scale": SCALE},
        r"dequant_scale=float16 \[5\]: dequant_scale is int64 or uint64 or bfloat16 or flo",
    ),
    (FULL, {"dequant_scale": PACKED[:4]}, r"dequant_scale=int64 \[4\]: .* \[1\] or \[5\] or \[1, 5\]; pass one like"),
    (FULL, {"dequant_scale": PACKED[:, None]}, r"dequant_scale=int64 \[5, 1\]: "),
    (
        TOKEN,
        {"pertoken_scale": zeros(M).half()},
        r"pertoken_scale=float16 \[4\]: pertoken_scale is float32 \[4\]; pass",
    ),
    (TOKEN, {"pertoken_scale": zeros(M, 1)}, r"pertoken_scale=float32 \[4, 1\]: pertoken_scale is float32 \[4\]"),
    (TOKEN, {"x1": Q1.view(2, 2, K), "pertoken_scale": zeros(2)}, r"pertoken_scale=float32 \[2\]: .* float32 \[4\]"),
    (WIRE, {"comm_quant_scale_2": None}, "comm_quant_scale_2=None: int8 on the wire takes two scales, .*; pass both"),
    (WIRE, {"comm_quant_scale_1": None}, "comm_quant_scale_1=None: int8 on the wire takes two scales"),
    (
        WIRE,
        {"comm_quant_scale_1": zeros(N)},
        r"comm_quant_scale_1=float32 \[5\]: comm_quant_scale_1 is float16 \[5\] or",
    ),
    (WIRE, {"comm_quant_scale_1": SCALE[:1]}, r"comm_quant_scale_1=float16 \[1\]: .* float16 \[5\] or \[1, 5\]"),
    (
        WIRE,
        {"comm_quant_scale_2": SCALE[None]},
        r"comm_quant_scale_2=float16 \[1, 5\]: comm_quant_scale_2 is float16 \[5\]",
    ),
]


@pytest.mark.parametrize(("call", "changes", "said"), [*CALL, *QUANTISERS, *FORMS])
def test_what_breaks_the_contract_is_refused(call: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    recorder = RecordingGroup(SingleGroup())
    matmul_all_reduce(group=recorder, **call)
    recorder.calls.clear()
    with pytest.raises(UsageError, match=said):
        matmul_all_reduce(group=recorder, **(call | changes))
    assert not recorder.calls


@pytest.mark.parametrize(("x1", "x2"), [
    (Q1, X2), (Q1, words(K, 1)), (Q1, zeros(K, N, dtype=torch.uint8)), (X1, zeros(K, N, dtype=torch.int64)),
    (X1, zeros(K, N, dtype=torch.bool)), (X1.to(torch.complex64), X2.to(torch.complex64)), (words(M, K), words(K, N)),
])  # fmt: skip
def test_dtypes_of_no_mode_are_not_supported(x1: Tensor, x2: Tensor) -> None:
    said = f"x1={str(x1.dtype)[6:]}, x2={str(x2.dtype)[6:]}: both are floats of one type, .*; convert one of them"
    with pytest.raises(UnsupportedError, match=said):
        matmul_all_reduce(x1, x2, SingleGroup())


MODES: list[tuple[dict[str, Any], Mode, torch.dtype]] = [
    (PLAIN, "plain", torch.float32),
    (PLAIN | {"x1": X1.bfloat16(), "x2": X2.bfloat16()}, "plain", torch.bfloat16),
    (WEIGHT, "weight-quant", torch.float32),
    (WEIGHT | {"x1": X1.half(), "antiquant_scale": SCALE[:1]}, "weight-quant", torch.float16),
    (FULL, "full-quant", torch.float16),
    (FULL | {"dequant_scale": zeros(1).bfloat16()}, "full-quant", torch.bfloat16),
    (TOKEN, "per-token", torch.float16),
    (TOKEN | {"dequant_scale": PACKED}, "per-token", torch.float16),
    (TOKEN | {"dequant_scale": zeros(1, N).bfloat16()}, "per-token", torch.bfloat16),
    (WIRE, "int8-wire", torch.float16),
    (WIRE | TOKEN, "int8-wire", torch.float16),
]


@pytest.mark.parametrize(("call", "mode", "dtype"), MODES)
def test_the_mode_and_the_outputs_type_follow_from_the_inputs(
    call: dict[str, Any], mode: Mode, dtype: torch.dtype
) -> None:
    """bfloat16 where dequant_scale is; float16 for a packed one, and for float32 beside pertoken_scale."""
    given = Given(
        call["x1"],
        call["x2"],
        None,
        None,
        Antiquant(call.get("antiquant_scale")),
        Dequant(*map(call.get, ("dequant_scale", "pertoken_scale", "comm_quant_scale_1", "comm_quant_scale_2"))),
        "sum",
        2,
        "tag",
    )
    operands = check(given)
    assert (operands.mode, operands.dtype, operands.shape) == (mode, dtype, (M, N))
    assert (operands.elements, operands.turns, operands.tag) == (M * N, 2, "tag")
    assert matmul_all_reduce(group=SingleGroup(), **call).dtype == dtype


def test_nothing_is_empty_by_contract_but_a_share_may_be() -> None:
    """A rank without features passes k_r = 0, with groups of any size, and a batch may have no rows."""
    empty = {"x1": X1[:, :0], "x2": W8[:0], "antiquant_group_size": 64, "antiquant_scale": zeros(0, N)}
    assert matmul_all_reduce(group=PlannedGroup(0, 3), **empty).shape == (M, N)
    assert matmul_all_reduce(X1[:0], X2, SingleGroup()).shape == (0, N)
    full = FULL | {"x1": Q1[:, :0], "x2": W8[:0]}
    assert matmul_all_reduce(group=SingleGroup(), **full).tolist() == [[0.0] * N] * M
