"""Models that users write: what multiplies and then sums over the ranks, in each form that torch.export can meet."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor, nn

K, N = 6, 4


class Model(nn.Module):
    """Tensors of this rank, and any forward over them."""

    def __init__(self, forward: Callable[..., Any], rank: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(rank)
        self.body = forward
        self.w = nn.Parameter(torch.randn(K, N, generator=draw, dtype=torch.float64))
        self.out_in = nn.Parameter(torch.randn(N, K, generator=draw, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(N, generator=draw, dtype=torch.float64))
        self.back = nn.Parameter(torch.randn(N, K, generator=draw, dtype=torch.float64))
        self.linear = nn.Linear(K, N).double()

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def summed(y: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    dist.all_reduce(y, op=op)
    return y


def functionally(y: Tensor) -> Tensor:
    return functional.all_reduce(y, "sum", dist.group.WORLD)


# ---- replaced: name → (forward, pairs)


def parallel(m: Any, x: Tensor) -> Tensor:
    """Two products, then their all-reduces: the first copy lies between the second product and its all-reduce."""
    a, b = x @ m.w, m.linear(x)
    dist.all_reduce(b)
    dist.all_reduce(a)
    return a - 2 * b


def changed_after(m: Any, x: Tensor) -> Tensor:
    """In place, as a bias is often added."""
    y = summed(x @ m.w)
    y += m.b
    return y.mul_(2)


def read_through_the_first_name(m: Any, x: Tensor) -> Tensor:
    """Every reader after the all-reduce sees the sum, whatever it calls it."""
    y = x @ m.w
    z = y
    dist.all_reduce(y)
    return z + y.view(-1, N).sum()


def without_gradients(m: Any, x: Tensor) -> Tensor:
    """In the export, a graph within the graph."""
    with torch.no_grad():
        y = summed(x @ m.w)
    return y + summed(m.linear(x))


def operand_changed_after(m: Any, x: Tensor) -> Tensor:
    """The weight has no gradient here, which would need the operand as it was."""
    h = x * 1
    y = summed(h @ m.w.detach())
    h.add_(1)
    return y + h.sum()


REPLACED: dict[str, tuple[Callable[..., Any], int]] = {
    "matmul": (lambda m, x: summed(torch.matmul(x, m.w)), 1),
    "linear": (lambda m, x: summed(F.linear(x, m.out_in)), 1),
    "linear with bias": (lambda m, x: summed(F.linear(x, m.out_in, m.b)), 1),
    "module": (lambda m, x: summed(m.linear(x)), 1),
    "transposed": (lambda m, x: summed(x @ m.out_in.t()), 1),
    "functional": (lambda m, x: functionally(x @ m.w), 1),
    "functional, read": (lambda m, x: torch.relu(functionally(m.linear(x))) + 1, 1),
    "waited for twice": (lambda m, x: functional.wait_tensor(functionally(x @ m.w)), 1),
    "a view of it": (lambda m, x: summed((x @ m.w).view(-1)), 1),
    "in turn": (lambda m, x: summed(summed(x @ m.w) @ m.back), 2),
    "summed twice": (lambda m, x: summed(summed(x @ m.w)), 1),  # the second is not of a product
    "parallel": (parallel, 2),
    "changed after": (changed_after, 1),
    "first name": (read_through_the_first_name, 1),
    "no_grad": (without_gradients, 2),
    "operand changed after": (operand_changed_after, 1),
}

FLAT: dict[str, tuple[Callable[..., Any], int]] = {
    "mm": (lambda m, x: summed(torch.mm(x, m.w)), 1),
    "addmm": (lambda m, x: summed(torch.addmm(m.b, x, m.w)), 1),
    "addmm of ones": (lambda m, x: summed(torch.addmm(m.b, x, m.w, beta=1, alpha=1)), 1),
}
"""Of `x [m, k]` only."""

# ---- left as they are: name → (forward, why)


def read_before(m: Any, x: Tensor) -> Tensor:
    y = x @ m.w
    z = y * 2
    return summed(y) + z


def aliased_before(m: Any, x: Tensor) -> Tensor:
    """The view shows the sum, once it is there: right only where the product is left in its memory."""
    y = x @ m.w
    z = y.view(-1)
    dist.all_reduce(y)
    return z


def part_of_it(m: Any, x: Tensor) -> Tensor:
    y = x @ m.w
    dist.all_reduce(y[0])
    return y


def seen_from_behind(m: Any, x: Tensor) -> Tensor:
    """The view is summed in place, and what it is a view of is returned."""
    y = x @ m.w
    dist.all_reduce(y.view(-1))
    return y


def operand_overwritten(m: Any, x: Tensor) -> Tensor:
    h = x * 1
    y = h @ m.w
    h.add_(1)
    return summed(y) + h.sum()


def operand_overwritten_within(m: Any, x: Tensor) -> Tensor:
    h = x * 1
    y = h @ m.w
    with torch.no_grad():
        h.add_(1)
    return summed(y) + h.sum()


def kept_apart(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The sum and its copy in the product's memory part ways."""
    y = x @ m.w
    z = functionally(y)
    y.copy_(z)
    y.add_(1)
    return y, z


def half(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return summed(F.linear(x.float(), m.out_in.float(), m.b.float()))


LEFT: dict[str, tuple[Callable[..., Any], str]] = {
    "max": (lambda m, x: summed(x @ m.w, dist.ReduceOp.MAX), "it reduces by max"),
    "min": (lambda m, x: summed(m.linear(x), dist.ReduceOp.MIN), "it reduces by min"),
    "not a product": (lambda m, x: summed(x * 2), "it sums mul, which is not a matmul"),
    "an input": (lambda m, x: functionally(x), "it sums x, which is not a matmul"),
    "relu between": (lambda m, x: summed(torch.relu(x @ m.w)), "it sums relu, which is not a matmul"),
    "four dims": (lambda m, x: summed(x[None, None] @ m.w), r"multiplies \[1, 1, .*\] by \[6, 4\], not \[m, k\] or"),
    "three by three": (lambda m, x: summed(x.view(-1, 1, K) @ m.w[None]), r"by \[1, 6, 4\], not"),
    "read before": (read_before, "matmul is also read by mul, before it is summed"),
    "aliased before": (aliased_before, "matmul is also read by view, before it is summed"),
    "part of it": (part_of_it, "it sums select, which is not a matmul"),
    "seen from behind": (seen_from_behind, "it sums view, which is not a matmul"),
    "operand overwritten": (operand_overwritten, "add_ may overwrite an operand of matmul before the all-reduce"),
    "overwritten within": (operand_overwritten_within, "may overwrite an operand of matmul"),
    "kept apart": (kept_apart, "its result is read beside copy_, which may change later"),
    "autocast": (half, "linear is of another dtype than its operands"),
    "integers": (lambda m, x: summed((9 * x).int() @ m.w.int()), "matmul is of int32, which the operator does not"),
    "complex": (lambda m, x: summed(x * 1j @ m.w.cdouble()), "matmul is of complex128, which the operator does not"),
    "coalesced": (
        lambda m, x: functional.all_reduce_coalesced([x @ m.w, m.linear(x)], "sum", dist.group.WORLD),
        "_c10d_functional.all_reduce_coalesced.default is not a plain all-reduce",
    ),
    "average": (lambda m, x: functional.all_reduce(x @ m.w, "avg", dist.group.WORLD), "it reduces by avg"),
}
FLAT_LEFT: dict[str, tuple[Callable[..., Any], str]] = {
    "addmm of a matrix": (lambda m, x: summed(torch.addmm(x @ m.w, x, m.w)), r"addmm adds \[5, 4\], not \[n\]"),
    "addmm scaled": (lambda m, x: summed(torch.addmm(m.b, x, m.w, alpha=2)), "it sums addmm, which is not a matmul"),
    "one dim": (lambda m, x: summed(x[0] @ m.w), r"multiplies \[6\] by \[6, 4\], not"),
}
