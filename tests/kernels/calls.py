"""Calls of `matmul_all_reduce` at any shape, and what the published contract says they give.

The oracle is written from the formulas, in numpy, with loops where the code under test has tricks; it calls none of it.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Call = dict[str, Any]
"""Keyword arguments of one rank."""

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One problem: x1 `[*rows, k_r]`, x2 `[k_r, n]` on each rank, and which of the optional inputs are there."""

    rows: tuple[int, ...]
    widths: tuple[int, ...]
    n: int
    dtype: torch.dtype
    scale: str = "column"
    group_size: int = 0
    packed: str = ""
    transposed: bool = False
    strided: bool = False
    bias: bool = False
    x3: bool = False
    offset: bool = False
    per_token: bool = False
    wire: bool = False
    seed: int = field(default=0, repr=False)

    def calls(self) -> list[Call]:
        """The arguments of every rank."""
        return [self._call(rank, torch.Generator().manual_seed(100 * self.seed + rank)) for rank in range(self.ranks)]

    @property
    def ranks(self) -> int:
        return len(self.widths)

    def _call(self, rank: int, generator: torch.Generator) -> Call:
        k, m = self.widths[rank], int(np.prod(self.rows))
        integers = self.dtype == torch.int8
        output = {"packed": torch.float16, "float32": torch.float16, "bfloat16": torch.bfloat16}.get(self.scale)
        dtype = output or self.dtype

        def real(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        def whole(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        x1 = whole(-128, 128, *self.rows, k).to(torch.int8) if integers else real(*self.rows, k)
        call: Call = {"x1": every_other(x1) if self.strided else x1}
        if integers:
            x2 = whole(-128, 128, k, self.n).to(torch.int8)
        elif self.packed:
            x2 = whole(-(2**31), 2**31, *((k, self.n // 8) if self.packed == "n" else (k // 8, self.n))).to(torch.int32)
        else:
            x2 = real(k, self.n) if self.scale == "none" else whole(-128, 128, k, self.n).to(torch.int8)
        call["x2"] = transposed(x2) if self.transposed or self.packed == "k" else x2
        if self.bias:
            call["bias"] = whole(-9999, 9999, self.n).to(torch.int32) if integers else real(self.n)
        if self.x3:
            call["x3"] = real(*self.rows, self.n)
        if integers:
            call |= self._dequant(real, k, m, dtype)
        elif self.scale != "none":
            call |= self._antiquant(real, k)
        return call

    def _antiquant(self, real: Any, k: int) -> Call:
        groups = -(-k // self.group_size) if self.group_size else 0
        shape = {"tensor": (1,), "column": (self.n,), "row": (1, self.n), "group": (groups, self.n)}[self.scale]
        call: Call = {"antiquant_scale": real(*shape).abs() / 64, "antiquant_group_size": self.group_size}
        return call | ({"antiquant_offset": real(*shape)} if self.offset else {})

    def _dequant(self, real: Any, k: int, m: int, dtype: torch.dtype) -> Call:
        scale = real(self.n, dtype=torch.float32).abs() / (2e4 * (k + 1) ** 0.5)
        call: Call = {"dequant_scale": scale.to(dtype) if dtype == torch.bfloat16 else scale}
        if self.scale == "packed":
            call["dequant_scale"] = torch.from_numpy(packed_by_hand(scale.numpy()))
        if self.per_token:
            call["pertoken_scale"] = real(m, dtype=torch.float32).abs() + 0.1
        if self.wire:  # alike on all ranks; fine enough that some values saturate
            call["comm_quant_scale_1"] = torch.linspace(0.004, 0.02, self.n).to(dtype)
            call["comm_quant_scale_2"] = torch.linspace(0.03, 0.01, self.n).to(dtype)[None]
            call["comm_quant_scale_1"] = call["comm_quant_scale_1"][None]
        return call


# ---- shapes that are multiples of nothing

ROWS = st.sampled_from([(0,), (1,), (3,), (5,), (2, 3), (1, 1), (3, 2)])
WIDTHS = st.lists(st.sampled_from([0, 1, 3, 7, 11]), min_size=1, max_size=5).map(tuple)
COLUMNS = st.sampled_from([1, 2, 5, 13])
COMMON = {
    "rows": ROWS,
    "transposed": st.booleans(),
    "strided": st.booleans(),
    "bias": st.booleans(),
    "x3": st.booleans(),
    "seed": st.integers(0, 99),
}
FLOAT = st.sampled_from([torch.float64, torch.float32, *HALVES])


def plain() -> st.SearchStrategy[Case]:
    return st.builds(Case, widths=WIDTHS, n=COLUMNS, dtype=FLOAT, scale=st.just("none"), **COMMON)


def weight_quant() -> st.SearchStrategy[Case]:
    """int8 and both packings of int4, by tensor, column and group of rows.

    Not one column packed along k: where k_r is 0 too, it cannot be told from eight packed along n. Nor, with one scale
    for all and without rows, a transposed view packed along n: its strides are those of one packed along k.
    """
    whole = st.sampled_from(["tensor", "column", "row"])
    words, columns = st.sampled_from([8, 24]), st.sampled_from([2, 5, 13])
    kinds = [("", WIDTHS, COLUMNS), ("n", WIDTHS, words), ("k", _widths(0, 8, 24), columns)]
    grouped = [
        ("", _widths(0, 33, 70, 97), COLUMNS),
        ("n", _widths(0, 33, 70), words),
        ("k", _widths(0, 40, 72), columns),
    ]
    shared: dict[str, Any] = {"dtype": FLOAT, "offset": st.booleans(), **COMMON}
    return st.one_of(
        *(st.builds(Case, packed=st.just(p), widths=w, n=n, scale=whole, **shared).filter(_told) for p, w, n in kinds),
        *(
            st.builds(Case, packed=st.just(p), widths=w, n=n, scale=st.just("group"), group_size=st.just(32), **shared)
            for p, w, n in grouped
        ),
    )


def _told(case: Case) -> bool:
    """Whether the dim in which words are packed can be told."""
    return not (case.packed == "n" and case.transposed and case.scale == "tensor" and 0 in case.widths)


def full_quant(*, per_token: bool, wire: bool) -> st.SearchStrategy[Case]:
    scales = ["packed", "bfloat16", *(["float32"] if per_token else [])]
    fixed: dict[str, Any] = {"dtype": st.just(torch.int8), "per_token": st.just(per_token), "wire": st.just(wire)}
    return st.builds(Case, widths=WIDTHS, n=COLUMNS, scale=st.sampled_from(scales), **fixed, **COMMON)


def _widths(*choices: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.sampled_from(choices), min_size=1, max_size=4).map(tuple)


def every_other(x: Tensor) -> Tensor:
    """The same values in memory that is not contiguous."""
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    return wide[..., ::2]


def transposed(x: Tensor) -> Tensor:
    """The same values as the view of a matrix of the other order, a slice of it where it is empty."""
    other = x.new_zeros(x.shape[1], x.shape[0] + 1)[:, 1:]
    return other.copy_(x.T).T


# ---- the oracle


def expected(calls: list[Call], n: int) -> tuple[Array, Array]:
    """The float64 sum over the ranks, and the sum of the absolute values of its terms: what rounding is relative to."""
    parts = [_full(call) if call["x1"].dtype == torch.int8 else _floating(call, n) for call in calls]
    return sum(value for value, _ in parts), sum(bound for _, bound in parts)  # type: ignore[return-value]


def check_formula(case: Case, found: list[Tensor]) -> None:
    """Every rank's output: the formula, and the same bits on all.

    To 4 roundings of the output's type relative to the sum of absolute terms: weight, product, bias and x3, reduce. On
    top, the order of summation: one float32 (or float64) rounding a term. A float16 may also round to a subnormal,
    which is off by 2⁻²⁵ at most on each rank.
    """
    value, bound = expected(case.calls(), case.n)
    dtype = found[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    terms = sum(case.widths) + 4
    tolerance = (2 * torch.finfo(dtype).eps + terms * torch.finfo(wide).eps) * bound + 1e-7 * (dtype == torch.float16)
    outputs = {"packed": torch.float16, "float32": torch.float16, "bfloat16": torch.bfloat16}
    assert dtype == outputs.get(case.scale, case.dtype)
    for y in found:
        assert y.shape == (*case.rows, case.n)
        assert (np.abs(numbers(y) - value) <= tolerance).all()
        assert torch.equal(y, found[0])


def numbers(x: Tensor) -> Array:
    return np.asarray(x.detach().double())


def weight(call: Call, n: int) -> Array:
    """x2 in float64, dequantised as the contract writes it: offset first, then scale."""
    if "antiquant_scale" not in call:
        return numbers(call["x2"])
    x2, k = call["x2"], call["x1"].shape[-1]
    if not k:
        return np.zeros((0, n))
    values = numbers(x2) if x2.dtype == torch.int8 else nibbles(np.asarray(x2), k)
    scale, offset = (numbers(call[name]) if name in call else None for name in ("antiquant_scale", "antiquant_offset"))
    assert scale is not None
    size = call["antiquant_group_size"]
    out = np.empty_like(values)
    for row in range(k):
        at = row // size if size else slice(None)
        out[row] = (values[row] + (0 if offset is None else offset[at])) * scale[at]
    return out


def nibbles(words: Array, k: int) -> Array:
    """int4 values, word by word: along n where the words have k rows, else along k."""
    along_n = len(words) == k
    lines = words if along_n else words.T
    out = np.zeros((lines.shape[0], 8 * lines.shape[1]))
    for i, line in enumerate(lines):
        for j, word in enumerate(line):
            for place in range(8):
                value = (int(word) >> (4 * place)) & 15
                out[i, 8 * j + place] = value - 16 if value > 7 else value
    return out if along_n else out.T


def packed_by_hand(scale: Array) -> Array:
    """`(bits & 0xFFFFE000) | 1 << 46`, number by number."""
    bits = scale.astype(np.float32).view(np.uint32)
    return np.array([(int(b) & 0xFFFFE000) | 1 << 46 for b in bits.ravel()], np.int64).reshape(scale.shape)


def scale_by_hand(scale: Tensor) -> Array:
    """The float32 values of a dequant_scale, packed or not."""
    if scale.dtype == torch.int64:
        return (np.asarray(scale) & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
    return np.asarray(scale.float())


def _floating(call: Call, n: int) -> tuple[Array, Array]:
    x1, x2 = numbers(call["x1"]), weight(call, n)
    extra = [numbers(call[name]) for name in ("bias", "x3") if name in call]
    return sum(extra, x1 @ x2), sum(map(np.abs, extra), np.abs(x1) @ np.abs(x2))


def _full(call: Call) -> tuple[Array, Array]:
    product = np.asarray(call["x1"]).astype(np.int64) @ np.asarray(call["x2"]).astype(np.int64)
    total = (product + np.asarray(call["bias"]) if "bias" in call else product).astype(np.float64)
    factor = scale_by_hand(call["dequant_scale"]).astype(np.float64)
    if "pertoken_scale" in call:
        factor = factor * numbers(call["pertoken_scale"]).reshape(*total.shape[:-1], 1)
    x3 = numbers(call["x3"]) if "x3" in call else np.zeros(1)
    return factor * total + x3, np.abs(factor * total) + np.abs(x3)


def over_int8(calls: list[Call]) -> Tensor:
    """Mode 5, rank by rank in float32, with every rounding where the contract has it: the bits of the output."""
    ranks, rows = len(calls), calls[0]["x1"].shape[:-1]
    first, second = (np.asarray(calls[0][f"comm_quant_scale_{i}"].float()).ravel() for i in (1, 2))
    m, n = int(np.prod(rows)), len(first)
    share = -(-m // ranks)
    sent = []
    for call in calls:
        product = np.asarray(call["x1"]).astype(np.int64) @ np.asarray(call["x2"]).astype(np.int64)
        total = product + np.asarray(call["bias"]) if "bias" in call else product
        mm = total.astype(np.float32) * scale_by_hand(call["dequant_scale"]).ravel()
        if "pertoken_scale" in call:
            mm = mm * np.asarray(call["pertoken_scale"]).reshape(*rows, 1)
        if "x3" in call:
            mm = mm + np.asarray(call["x3"].float())
        padded = np.zeros((share * ranks, n), np.float32)
        padded[:m] = mm.reshape(m, n) / first
        sent.append(_int8(padded))
    gathered = []
    for receiver in range(ranks):
        total = np.zeros((share, n), np.float32)
        for sender in range(ranks):
            total = total + sent[sender][receiver * share : (receiver + 1) * share].astype(np.float32)
        gathered.append(_int8(total * (first / second)))
    values = np.concatenate(gathered)[:m].astype(np.float32) * second
    dtype = torch.bfloat16 if calls[0]["dequant_scale"].dtype == torch.bfloat16 else torch.float16
    return torch.from_numpy(values).to(dtype).reshape(*rows, n)


def _int8(x: Array) -> Array:
    assert x.dtype == np.float32
    return np.clip(np.rint(x), -128, 127).astype(np.int8)
