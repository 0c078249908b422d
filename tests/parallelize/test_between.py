"""One operator between two linears: what it does to a split there, against the unsharded twin."""

from collections.abc import Callable

import pytest
import torch
from tests.parallelize.twins import compare
from torch import Tensor, nn


class Between(nn.Module):
    """`up [8 → wide]`, `side [8 → wide]`, `down [narrow → 8]`, and what a case asks for; `inner` puts them together."""

    def __init__(self, inner: Callable[["Between", Tensor], Tensor], wide: int, narrow: int, gate: nn.Module) -> None:
        super().__init__()
        self.inner, self.gate = inner, gate
        self.up, self.side, self.down = nn.Linear(8, wide), nn.Linear(8, wide), nn.Linear(narrow, 8)
        self.one, self.few = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor([0.5, 2.0, -1.0, 3.0]))
        self.mixed, self.bias = nn.Parameter(torch.randn(narrow, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self, x)


Case = Callable[[Between, Tensor], Tensor]


def check(case: Case, wide: int = 11, narrow: int | None = None, gate: nn.Module | None = None, ranks: int = 3) -> str:
    """The twins' comparison in float64, and how the split model runs."""
    torch.manual_seed(7)
    model = Between(case, wide, wide if narrow is None else narrow, gate or nn.Identity()).double()
    return str(compare(model, (torch.randn(2, 3, 8, dtype=torch.float64),), ranks).runs)


SCALARS: dict[str, Case] = {
    "a parameter": lambda m, x: m.down(m.up(x).relu() * m.one),
    "a value": lambda m, x: m.down(m.up(x).relu() * x.mean()),
    "its sigmoid": lambda m, x: m.down(m.up(x).relu() * m.one.sigmoid()),
    "one for each row": lambda m, x: m.down(m.up(x).relu() * m.gate(x)),
    "one place of few": lambda m, x: m.down(m.up(x) * (x.mean(-1, keepdim=True) + m.few[:1])),
}


@pytest.mark.parametrize("name", SCALARS)
def test_a_single_number_that_meets_what_is_split_gets_its_whole_gradient(name: str) -> None:
    check(SCALARS[name], gate=nn.Linear(8, 1))


def test_a_product_with_factors_stays_whole() -> None:
    """`beta` and `alpha` of addmm."""
    check(lambda m, x: torch.addmm(m.bias, m.up(x).flatten(0, 1), m.mixed, beta=0.5, alpha=2.0).view_as(x))


def test_a_bias_is_not_split_without_its_weight() -> None:
    """A place picked by number leaves `down.weight` whole, and so the bias behind it."""
    check(lambda m, x: m.down(m.up(x)[..., [3, 1, 2, 0, 4, 10, 9, 8, 7, 6, 5]]))
