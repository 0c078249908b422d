"""The operator's siblings against the unsharded product: values, gradients, refusals, and what moves.

The twin is one matmul of whole matrices in float64, where another order of summation differs by some 1e-15 and anything
wrong by far more than 1e-12.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels import calls
from tests.kernels.calls import Case, every_other
from torch import Tensor

from shardwright.comm.group import Group
from shardwright.comm.planned import PlannedGroup
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.single import SingleGroup
from shardwright.errors import UnsupportedError, UsageError
from shardwright.kernels import siblings
from shardwright.kernels.quant import pack_dequant_scale
from shardwright.kernels.siblings import all_gather_matmul, matmul_all_reduce_add_rms_norm, matmul_reduce_scatter
from shardwright.layout.partition import Partition
from shardwright.testing.ranks import on_threads

K, N, EPS = 7, 5, 1e-3
WIDTHS = st.lists(st.sampled_from([0, 1, 3, 4]), min_size=1, max_size=5)
FEW = settings(deadline=None, max_examples=60, derandomize=True)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def close(ours: Tensor | None, theirs: Tensor | None) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def weighed(x: Tensor, rank: int) -> Tensor:
    """A loss in which every element counts differently, and on every rank."""
    return (x.sin() * torch.arange(1.0, x.numel() + 1, dtype=x.dtype).reshape(x.shape) * (rank + 1)).sum()


def oracle_norm(y: Tensor, gamma: Tensor) -> Tensor:
    return y / (y.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * gamma


# ---- against the whole product


def check_all_gather(group: Group, sizes: list[int], strided: bool) -> None:
    """Every rank multiplies all rows by a weight of its own and uses both outputs in a loss of its own; losses add."""
    ranks = range(group.size)
    x, weights, biases = (
        leaf(drawn(sum(sizes), K)),
        [leaf(drawn(N + r, K, seed=10 + r)) for r in ranks],
        [leaf(drawn(N + r, seed=20 + r)) for r in ranks],
    )
    sum(weighed(x @ weights[r].T + biases[r], r) + weighed(x, r) for r in ranks).backward()  # type: ignore[union-attr]

    start, stop = Partition.explicit(sizes).range(group.rank)
    share, weight, bias = leaf(x[start:stop]), leaf(weights[group.rank]), leaf(biases[group.rank])
    recorder = RecordingGroup(group)
    x1 = every_other(share) if strided else share
    y, gathered = all_gather_matmul(x1, weight.T, recorder, sizes=sizes, bias=bias, tag="here")
    close(gathered, x)
    close(y, x @ weights[group.rank].T + biases[group.rank])
    (weighed(y, group.rank) + weighed(gathered, group.rank)).backward()
    close(share.grad, x.grad[start:stop])  # type: ignore[index]
    close(weight.grad, weights[group.rank].grad)
    close(bias.grad, biases[group.rank].grad)
    moved = [(call.op, call.bytes, call.tag) for call in recorder.calls]
    assert moved == [
        ("all_gather", sizes[group.rank] * K * 8, "here"),
        ("reduce_scatter", sum(sizes) * K * 8, "here/grad"),
    ]


@FEW
@given(sizes=WIDTHS, strided=st.booleans())
def test_all_gather_matmul_and_its_gradients(sizes: list[int], strided: bool) -> None:
    on_threads(len(sizes), check_all_gather, sizes, strided)


def check_reduce_scatter(group: Group, widths: list[int], sizes: list[int], strided: bool) -> None:
    """Each rank has some columns of x and rows of the weight, and uses its rows of the sum in a loss of its own."""
    m = sum(sizes)
    x, weight, bias, x3 = (
        leaf(t) for t in (drawn(m, sum(widths)), drawn(N, sum(widths), seed=1), drawn(N, seed=2), drawn(m, N, seed=3))
    )
    whole = x @ weight.T + group.size * bias + x3
    rows = [Partition.explicit(sizes).range(r) for r in range(group.size)]
    sum(weighed(whole[a:b], r) for r, (a, b) in enumerate(rows)).backward()  # type: ignore[union-attr]

    start, stop = Partition.explicit(widths).range(group.rank)
    mine = [leaf(t) for t in (x[:, start:stop], weight[:, start:stop], bias, x3)]
    recorder = RecordingGroup(group)
    x1 = every_other(mine[0]) if strided else mine[0]
    first: dict[str, Tensor] = {"x3": mine[3]} if group.rank == 0 else {}
    y = matmul_reduce_scatter(x1, mine[1].T, recorder, sizes=sizes, bias=mine[2], **first, tag="here")
    close(y, whole[slice(*rows[group.rank])])
    weighed(y, group.rank).backward()
    close(mine[0].grad, x.grad[:, start:stop])  # type: ignore[index]
    close(mine[1].grad, weight.grad[:, start:stop])  # type: ignore[index]
    close(mine[2].grad, bias.grad / group.size)  # type: ignore[operator]
    if first:
        close(mine[3].grad, x3.grad)
    moved = [(call.op, call.bytes, call.tag) for call in recorder.calls]
    assert moved == [("reduce_scatter", m * N * 8, "here"), ("all_gather", sizes[group.rank] * N * 8, "here/grad")]


@FEW
@given(data=st.data(), widths=WIDTHS, strided=st.booleans())
def test_matmul_reduce_scatter_and_its_gradients(data: st.DataObject, widths: list[int], strided: bool) -> None:
    """Bias goes in on every rank and counts once each; x3 on rank 0 only."""
    sizes = data.draw(st.lists(st.integers(0, 3), min_size=len(widths), max_size=len(widths)))
    on_threads(len(widths), check_reduce_scatter, widths, sizes, strided)


def check_norm(group: Group, rows: tuple[int, ...], widths: list[int]) -> None:
    """The residual goes in on every rank, and counts once."""
    k = sum(widths)
    x, weight, residual, gamma, bias = (
        leaf(drawn(*shape, seed=i)) for i, shape in enumerate([(*rows, k), (N, k), (*rows, N), (N,), (N,)])
    )
    y = x @ weight.T + bias + residual
    norm = oracle_norm(y, gamma)
    (weighed(norm, 0) + weighed(y, 1)).backward()

    start, stop = Partition.explicit(widths).range(group.rank)
    mine = [leaf(t) for t in (x[..., start:stop], weight[:, start:stop], residual, gamma, bias)]
    recorder = RecordingGroup(group)
    first: dict[str, Tensor] = {"bias": mine[4]} if group.rank == 0 else {}
    found = matmul_all_reduce_add_rms_norm(mine[0], mine[1].T, *mine[2:4], recorder, eps=EPS, **first, tag="here")
    close(found[0], norm)
    close(found[1], y)
    (weighed(found[0], 0) + weighed(found[1], 1)).backward()
    close(mine[0].grad, x.grad[..., start:stop])  # type: ignore[index]
    close(mine[1].grad, weight.grad[:, start:stop])  # type: ignore[index]
    close(mine[2].grad, residual.grad)
    close(mine[3].grad, gamma.grad)
    if first:
        close(mine[4].grad, bias.grad)
    assert [(call.op, call.bytes, call.tag) for call in recorder.calls] == [("all_reduce", y.numel() * 8, "here")]


@FEW
@given(rows=calls.ROWS, widths=WIDTHS)
def test_matmul_all_reduce_add_rms_norm_and_its_gradients(rows: tuple[int, ...], widths: list[int]) -> None:
    on_threads(len(widths), check_norm, rows, widths)


# ---- finite differences, on one rank


def test_gradients_by_finite_differences() -> None:
    """Float64: gradcheck's own tolerances, 1e-6 relative step and 1e-5 absolute difference."""
    group = SingleGroup()
    x1, x2, bias, x3, gamma = (leaf(drawn(*s, seed=i)) for i, s in enumerate([(3, K), (K, N), (N,), (3, N), (N,)]))
    eight = torch.arange(-20, 15, dtype=torch.int8).reshape(K, N)
    quantised = {"antiquant_scale": bias.detach().abs(), "antiquant_offset": bias.detach()}
    functions: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = [
        (lambda a, b, c: all_gather_matmul(a, b, group, bias=c), (x1, x2, bias)),
        (lambda a, b, c, d: matmul_reduce_scatter(a, b, group, bias=c, x3=d), (x1, x2, bias, x3)),
        (lambda a, b, c, d, e: matmul_all_reduce_add_rms_norm(a, b, c, d, group, bias=e), (x1, x2, x3, gamma, bias)),
        (lambda a, c, d: matmul_all_reduce_add_rms_norm(a, eight, c, d, group, **quantised), (x1, x3, gamma)),
    ]
    for function, inputs in functions:
        assert torch.autograd.gradcheck(function, inputs)


# ---- narrower types and quantised operands


def halves(group: Group, dtype: torch.dtype) -> list[Tensor]:
    x1, x2 = drawn(5, 6, seed=group.rank, dtype=dtype), drawn(6, N, seed=9 + group.rank, dtype=dtype)
    return [
        *all_gather_matmul(x1, x2, group),
        matmul_reduce_scatter(x1, x2, group),
        *matmul_all_reduce_add_rms_norm(x1, x2, drawn(5, N, dtype=dtype), drawn(N, seed=1, dtype=dtype), group),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, *calls.HALVES])
def test_narrower_types_round_a_few_times_and_give_equal_bits(dtype: torch.dtype) -> None:
    """To 8 roundings of the type, relative to the largest terms (of 18 normal products, below 40): product, reduce,
    residual, norm and gamma. Two runs give equal bits, and so do the ranks where all have the result.
    """
    runs = [on_threads(3, halves, dtype) for _ in range(2)]
    pairs = [
        (drawn(5, 6, seed=r, dtype=dtype).double(), drawn(6, N, seed=9 + r, dtype=dtype).double()) for r in range(3)
    ]
    total = sum(a @ b for a, b in pairs)
    y = total + drawn(5, N, dtype=dtype).double()
    norm = y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * drawn(N, seed=1, dtype=dtype).double()
    everything = torch.cat([a for a, _ in pairs])
    for rank, found in enumerate(runs[0]):
        share = total[slice(*Partition.balanced(5, 3).range(rank))]  # type: ignore[index]
        for ours, theirs in zip(found, [everything @ pairs[rank][1], everything, share, norm, y], strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=4 * torch.finfo(dtype).eps * 40)
        assert all(torch.equal(a, b) for a, b in zip(found, runs[1][rank], strict=True))
        assert all(torch.equal(found[i], runs[0][0][i]) for i in (1, 3, 4))


QUANTISED = [
    Case((3,), (7, 0, 11), 8, torch.float32, packed="n", offset=True, bias=True),
    Case((3,), (70, 33), 5, torch.float32, scale="group", group_size=32),
    Case((2, 3), (7, 11), 5, torch.int8, scale="bfloat16", bias=True),
    Case((3,), (7,), 5, torch.int8, scale="packed"),
]


def norm_of(group: Group, case: Case) -> tuple[Tensor, Tensor]:
    dtype = {"bfloat16": torch.bfloat16, "packed": torch.float16}.get(case.scale, case.dtype)
    gamma, residual = torch.ones(case.n, dtype=dtype), drawn(*case.rows, case.n, dtype=dtype)
    call = case.calls()[group.rank]
    return matmul_all_reduce_add_rms_norm(group=group, residual=residual, gamma=gamma, eps=EPS, **call)


@pytest.mark.parametrize("case", QUANTISED)
def test_the_norm_takes_the_operators_quantised_modes(case: Case) -> None:
    """Against the formula in float64; to 4 roundings of the output's type relative to the sum of absolute terms."""
    value, bound = (torch.from_numpy(x) for x in calls.expected(case.calls(), case.n))
    for norm, y in on_threads(case.ranks, norm_of, case):
        residual = drawn(*case.rows, case.n, dtype=y.dtype).double()
        eps = 2 * torch.finfo(y.dtype).eps
        wide = sum(case.widths) * torch.finfo(torch.float32).eps
        assert ((y.double() - value - residual).abs() <= (eps + wide) * (bound + residual.abs())).all()
        theirs = oracle_norm(y.double(), torch.ones((), dtype=torch.float64))
        torch.testing.assert_close(norm.double(), theirs, rtol=eps, atol=0)


def test_a_gradient_with_int8_operands_is_refused() -> None:
    call = QUANTISED[3].calls()[0]
    residual = drawn(3, 5, dtype=torch.float16).requires_grad_()
    with pytest.raises(UnsupportedError, match="residual=requires_grad: int8 by int8 is for inference"):
        matmul_all_reduce_add_rms_norm(residual=residual, gamma=torch.ones(5).half(), group=SingleGroup(), **call)


# ---- defaults, meta tensors, the table


def test_rows_are_equal_before_and_balanced_after_unless_sizes_say_otherwise() -> None:
    """On rank 1 of 3: 4 rows each are 12; 8 rows are dealt 3, 3, 2."""
    group = PlannedGroup(1, 3)
    y, gathered = all_gather_matmul(on_meta(4, K), on_meta(K, N), group)
    assert (y.shape, gathered.shape) == ((12, N), (12, K))
    y, gathered = all_gather_matmul(on_meta(4, K), on_meta(K, N), group, sizes=[0, 4, 1])
    assert (y.shape, gathered.shape) == ((5, N), (5, K))
    assert matmul_reduce_scatter(on_meta(8, K), on_meta(K, N), group).shape == (3, N)
    assert matmul_reduce_scatter(on_meta(8, K), on_meta(K, N), group, sizes=[8, 0, 0]).shape == (0, N)
    norm, y = matmul_all_reduce_add_rms_norm(on_meta(8, K), on_meta(K, N), on_meta(8, N), on_meta(N), group)
    assert (norm.shape, y.shape) == ((8, N), (8, N))


def on_meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", requires_grad=True)


@pytest.mark.parametrize(("table", "run"), [
    ("GATHER", lambda: all_gather_matmul(drawn(2, K), drawn(K, N), SingleGroup())),
    ("SCATTER", lambda: matmul_reduce_scatter(drawn(2, K), drawn(K, N), SingleGroup())),
    ("NORM", lambda: matmul_all_reduce_add_rms_norm(drawn(2, K), drawn(K, N), drawn(2, N), drawn(N), SingleGroup())),
])  # fmt: skip
def test_the_table_is_obeyed(monkeypatch: pytest.MonkeyPatch, table: str, run: Callable[[], object]) -> None:
    monkeypatch.setitem(getattr(siblings, table), "reference", lambda operands, group: (type(operands), group.size))
    kind, size = run()  # type: ignore[misc]
    assert (kind.__name__, size) == ("NormOperands" if table == "NORM" else "ShareOperands", 1)


# ---- refusals

X1, X2, PAIR = torch.zeros(4, K), torch.zeros(K, N), PlannedGroup(0, 2)


@pytest.mark.parametrize(("arguments", "options", "said"), [
    ((X1[None], X2), {}, r"x1=\[1, 4, 7\]: x1 is \[m, k\]; flatten it to two dims"),
    ((X1, X2[0]), {}, r"x2=\[5\]: x2 is \[k, n\]; flatten it to two dims"),
    ((X1[:, 1:], X2), {}, r"x1=\[4, 6\]: x1 is .* with k = 7; match x2's rows"),
    ((X1, X2.half()), {}, "x2=float16: x1 is float32; convert one of them"),
    ((X1, X2), {"bias": torch.zeros(4)}, r"bias=float32 \[4\]: bias is float32 \[5\]; pass one like that"),
    ((X1, X2), {"sizes": [4]}, r"sizes=\[4\]: one number of rows, not negative, for each of 2 ranks; fix sizes"),
    ((X1, X2), {"sizes": [5, -1]}, r"sizes=\[5, -1\]: one number of rows, not negative"),
])  # fmt: skip
@pytest.mark.parametrize("operator", [all_gather_matmul, matmul_reduce_scatter])
def test_what_breaks_the_contract_is_refused(
    operator: Callable[..., Any], arguments: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        operator(*arguments, PAIR, **options)


@pytest.mark.parametrize("operator", [all_gather_matmul, matmul_reduce_scatter])
def test_quantised_operands_are_the_operators_own(operator: Callable[..., Any]) -> None:
    for x1, x2, name in ((X1.to(torch.int8), X2, "x1"), (X1, X2.to(torch.int8), "x2")):
        with pytest.raises(UnsupportedError, match=f"{name}=int8: quantised operands are for matmul_all_reduce; deq"):
            operator(x1, x2, PAIR)


def test_what_only_one_of_them_refuses() -> None:
    with pytest.raises(UsageError, match=r"x1=\[4, 7\]: sizes gives rank 0 3 rows; pass every rank's rows in sizes"):
        all_gather_matmul(X1, X2, PAIR, sizes=[3, 4])
    with pytest.raises(UsageError, match=r"sizes=\[3, 4\]: they sum to x1's 4 rows; leave sizes out to cut evenly"):
        matmul_reduce_scatter(X1, X2, PAIR, sizes=[3, 4])
    with pytest.raises(UsageError, match=r"x3=float32 \[2, 5\]: x3 is like the output, float32 \[4, 5\]"):
        matmul_reduce_scatter(X1, X2, PAIR, x3=torch.zeros(2, N))
    with pytest.raises(UsageError, match="reduce_op=max: only a sum distributes over the split matmul; use 'sum'"):
        matmul_reduce_scatter(X1, X2, PAIR, reduce_op="max")


@pytest.mark.parametrize(("changes", "said"), [
    ({"residual": torch.zeros(N)}, r"residual=float32 \[5\]: residual is like the output, float32 \[4, 5\]; pass one"),
    ({"gamma": torch.zeros(1, N)}, r"gamma=float32 \[1, 5\]: gamma is float32 \[5\]; pass one like that"),
    ({"gamma": torch.zeros(N).half()}, r"gamma=float16 \[5\]: gamma is float32 \[5\]"),
    ({"eps": -1.0}, "eps=-1.0: finite and not negative; use 1e-6"),
    ({"eps": float("nan")}, "eps=nan: finite and not negative"),
    ({"reduce_op": "max"}, "reduce_op=max: only a sum"),
    ({"dequant_scale": pack_dequant_scale(torch.ones(1))}, r"dequant_scale=int64 \[1\]: x1 and x2 are float32"),
])  # fmt: skip
def test_what_breaks_the_norms_contract_is_refused(changes: dict[str, Any], said: str) -> None:
    call: dict[str, Any] = {"x1": X1, "x2": X2, "residual": torch.zeros(4, N), "gamma": torch.ones(N), "group": PAIR}
    with pytest.raises(UsageError, match=said):
        matmul_all_reduce_add_rms_norm(**(call | changes))
