"""The symmetric-memory kernels, with torch's own fallbacks in the operators' place: never run on devices that have it.

What is tested is that arguments arrive and results mean what they should, on gloo processes in float64 (1e-12: another
order of two or three terms), and that the kernels refuse where the operators cannot run.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwright.comm.group import Group
from shardwright.comm.single import SingleGroup
from shardwright.comm.torch_group import TorchGroup
from shardwright.errors import UnsupportedError, UsageError
from shardwright.kernels.cuda import symmetric
from shardwright.kernels.operands import Antiquant, Dequant, Given, check
from shardwright.testing.ranks import on_gloo

M, K, N = 6, 5, 4
RTOL = 1e-12


def draw(rank: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def close(found: Tensor | None, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=RTOL, atol=RTOL)


def check_values(group: Group, store: str) -> None:
    import torch.distributed._symmetric_memory as memory

    dist.init_process_group("gloo", store=dist.FileStore(store, group.size), rank=group.rank, world_size=group.size)
    fakes = torch.library.Library("symm_mem", "IMPL")
    fakes.impl("fused_matmul_reduce_scatter", memory._fused_matmul_reduce_scatter_fallback, "CPU")
    fakes.impl("fused_all_gather_matmul", memory._fused_all_gather_matmul_fallback, "CPU")
    ranks, me = range(group.size), group.rank
    x1, x2 = [draw(rank, M, K) for rank in ranks], [draw(10 + rank, K, N) for rank in ranks]
    total = torch.stack([a @ b for a, b in zip(x1, x2, strict=True)]).sum(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symmetric, "why_not_symmetric", lambda group: None)
        world = TorchGroup.of(dist.distributed_c10d._get_default_group())
        rows = symmetric.fused_matmul_reduce_scatter(x1[me], x2[me], world)
        close(rows, total.chunk(group.size)[me])
        close(symmetric.fused_matmul_all_reduce(x1[me], x2[me], world), total)
        given = Given(x1[me].view(2, 3, K), x2[me], None, None, Antiquant(), Dequant(), "sum", 0, "x")
        close(symmetric.matmul_all_reduce(check(given), world), total.view(2, 3, N))
        weight, bias = draw(20, K, N), draw(21, N)
        y, x = symmetric.fused_all_gather_matmul(x1[me], weight, world, bias=bias)
        close(x, torch.cat(x1))
        close(y, torch.cat(x1) @ weight + bias)
        y, x = symmetric.fused_all_gather_matmul(x1[me], weight, world, gather_output=False)
        assert x is None
        close(y, torch.cat(x1) @ weight)
    fakes._destroy()


def test_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    on_gloo(2, check_values, str(tmp_path / "store"))


X1, X2 = torch.ones(M, K), torch.ones(K, N)
KERNELS: list[Any] = [
    symmetric.fused_matmul_reduce_scatter,
    symmetric.fused_all_gather_matmul,
    symmetric.fused_matmul_all_reduce,
]


@pytest.mark.parametrize("kernel", KERNELS)
def test_here_they_are_refused_or_something_else_runs(kernel: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"{kernel.__name__}: a SingleGroup has no process group; leave the"):
        kernel(X1, X2, SingleGroup())
    with pytest.raises(UnsupportedError, match="has no gradient"):
        kernel(X1.clone().requires_grad_(), X2, SingleGroup())
    with pytest.raises(UnsupportedError, match=r"x1 is \[2, 3, 5\], not \[m, k\]"):
        kernel(X1.view(2, 3, K), X2, SingleGroup())
    seen: dict[str, Any] = {}
    with pytest.warns(UserWarning, match="no process group; multiplying and communicating one after the other"):
        assert kernel(X1, X2, SingleGroup(), tag="t", unfused=lambda *_, **given: seen.update(given)) is None
    assert seen["tag"] == "t"
    assert seen["bias"] is None


@pytest.mark.parametrize("kernel", [KERNELS[0], KERNELS[2]])
def test_what_the_scattering_operator_cannot_do(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    monkeypatch.setattr(symmetric, "why_not_symmetric", lambda group: None)
    with pytest.raises(UnsupportedError, match="the fused operator adds nothing before the reduce"):
        kernel(X1, X2, SingleGroup(), bias=torch.ones(N))
    group = SingleGroup()
    group.size = 4
    with pytest.raises(UnsupportedError, match="6 rows do not divide by 4 ranks"):
        kernel(X1, X2, group)
    with pytest.raises(UsageError, match="reduce_op=max: only a sum"):
        kernel(X1, X2, group, reduce_op="max")


def test_only_x1_is_gathered() -> None:
    with pytest.raises(UsageError, match="gather_index=1: x1 is gathered, never x2"):
        symmetric.fused_all_gather_matmul(X1, X2, SingleGroup(), gather_index=1)
