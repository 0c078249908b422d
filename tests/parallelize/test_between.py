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


MOVES: dict[str, tuple[Case, int, int]] = {
    "roll": (lambda m, x: m.down(m.up(x).roll(2, -1)), 11, 11),
    "roll through all dims": (lambda m, x: m.down(m.up(x).roll(1)), 11, 11),
    "roll along the sequence": (lambda m, x: m.down(m.up(x).roll(1, 1)), 11, 11),
    "every second": (lambda m, x: m.down(m.up(x)[..., ::2]), 21, 11),
    "every second of two": (lambda m, x: m.down(m.up(x)[..., ::2].sigmoid() * m.up(x)[..., 1::2]), 22, 11),
    "shuffle": (lambda m, x: m.down(m.up(x).unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2)), 12, 12),
    "flip in each part": (lambda m, x: m.down(m.up(x).unflatten(-1, (3, 4)).flip(-1).flatten(-2)), 12, 12),
    "roll in each part": (lambda m, x: m.down(m.up(x).unflatten(-1, (3, 4)).roll(1, -1).flatten(-2)), 12, 12),
    "second of each": (lambda m, x: m.down(m.up(x).unflatten(-1, (3, 4)).unbind(-1)[1]), 12, 3),
    "one scale for all parts": (lambda m, x: m.down((m.up(x).unflatten(-1, (3, 4)) * m.few).flatten(-2)), 12, 12),
    "one gate for each part": (
        lambda m, x: m.down((m.up(x).unflatten(-1, (3, 4)) * m.gate(x)[..., None]).flatten(-2)),
        12,
        12,
    ),
}
"""Places of one linear that the next one finds elsewhere: what is inside, the width before, the width after."""


@pytest.mark.parametrize("ranks", [2, 5])
@pytest.mark.parametrize("name", MOVES)
def test_what_moves_between_two_linears_is_found_where_it_lies(name: str, ranks: int) -> None:
    case, wide, narrow = MOVES[name]
    check(case, wide, narrow, gate=nn.Linear(8, 3), ranks=ranks)


class BySize(nn.Module):
    """An activation scaled by how wide it is."""

    def forward(self, y: Tensor) -> Tensor:
        return y.tanh() / y.shape[-1] ** 0.5


class Listed(nn.Module):
    """Two of them in a list, which nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList([nn.Tanh(), BySize()])

    def forward(self, y: Tensor) -> Tensor:
        for one in self.each:
            y = one(y)
        return y


SIZES: dict[str, Case] = {
    "in its own code": lambda m, x: m.down(m.up(x) / m.up(x).shape[-1] ** 0.5),
    "an integer": lambda m, x: m.down(m.up(x) * m.up(x).size(-1)),
    "in a module called on a part": lambda m, x: m.down(m.gate.each[1](m.up(x))),
    "in one of a list": lambda m, x: m.down(m.gate(m.up(x))),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_number_from_the_size_of_what_is_split_is_the_whole_size(name: str) -> None:
    """The modules' own code would see a rank's size: the traced graph runs, which holds the whole's."""
    assert "computes with a size that is split" in check(SIZES[name], gate=Listed())


def test_a_number_that_is_no_size_leaves_the_modules_running() -> None:
    assert check(lambda m, x: m.down(0.5 * m.up(x).pow(2) / 11**0.5)) == "modules"


def test_tensors_made_in_a_forward_are_no_obstacle() -> None:
    """The module's code runs on meta tensors to be understood; what it makes without a device is meta then too."""

    def masked(m: Between, x: Tensor) -> Tensor:
        heads = m.up(x).view(2, 3, m.down.in_features // 3, 3).transpose(1, 2)
        scores = heads @ heads.transpose(-1, -2) + torch.full((3, 3), float("-inf"), dtype=x.dtype).triu(1)
        return m.down((scores.softmax(-1) @ heads).transpose(1, 2).flatten(2))

    assert check(masked, wide=12)


COUNTED: dict[str, Case] = {
    "one module, two summands": lambda m, x: m.down(m.up(x)) + m.down(m.side(x)),
    "summands used again": lambda m, x: m.down(m.up(m.down(m.up(x)) * 2 + m.gate(m.side(x)))) + m.gate(m.side(x)),
    "two outputs joined": lambda m, x: torch.cat([m.up(x), m.side(x)], -1),
    "two outputs added": lambda m, x: m.up(x) + m.side(x),
    "one row of an output": lambda m, x: m.up(x)[:, -1],
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_plan_has_what_moves(name: str) -> None:
    """Outputs are gathered behind the module that makes them, whatever the model does to them then."""
    check(COUNTED[name], gate=nn.Linear(11, 8))


def test_a_module_called_on_two_values_sums_the_gradient_of_each_once() -> None:
    """One comes out of a module called once, the other of one called twice."""
    check(lambda m, x: m.down(m.up(x)) + m.gate(m.side(x)) + m.down(m.side(x)), gate=nn.Linear(11, 8))


HEADS: dict[str, Case] = {
    "times a number": lambda m, x: m.up(x) * m.one,
    "times a parameter": lambda m, x: m.up(x) * m.mixed[:, 0],
    "times a gate of its own": lambda m, x: m.up(x) * m.gate(x).softmax(-1)[..., :1] + m.side(x) * m.gate(x)[..., 1:2],
}


@pytest.mark.parametrize("name", HEADS)
def test_an_output_that_meets_something_before_the_model_returns_it(name: str) -> None:
    """A module's output would be gathered whole before it meets a part, or before a gradient counted as partial."""
    check(HEADS[name], gate=nn.Linear(8, 3))


def test_parts_that_every_rank_holds_are_whole_when_joined_and_when_cut_apart() -> None:
    """Attention sinks: a column for each head beside the scores, dropped after the softmax; `down` is split."""

    def sinks(m: Between, x: Tensor) -> Tensor:
        heads = m.up(x).view(2, 3, 4, 3).transpose(1, 2)
        column = m.few.view(1, 4, 1, 1).expand(2, -1, 3, -1)
        scores = torch.cat([heads @ heads.transpose(-1, -2), column], -1).softmax(-1)[..., :-1]
        return m.down((scores @ heads).transpose(1, 2).flatten(2))

    check(sinks, wide=12)


def test_a_state_of_zeros_belongs_to_nobody() -> None:
    """A recurrence over steps, as of state-space models: what meets its first state is not split."""

    def steps(m: Between, x: Tensor) -> Tensor:
        state, inner = torch.zeros(2, 11, 4, dtype=x.dtype), torch.cat([m.up(x), m.side(x)], 1).softmax(-1)
        for at in range(3):
            state = m.few.sigmoid() * state + inner[:, at, :, None] * inner[:, 3 + at, :1, None]
        return m.down(state.sum(-1))

    check(steps)


def test_what_is_joined_and_then_meets_parts_has_its_parts_or_is_whole() -> None:
    check(
        lambda m, x: m.down(torch.cat([x, m.up(x)], -1) * torch.cat([m.side(x), m.gate(x)], -1)),
        11,
        19,
        nn.Linear(8, 8),
    )
    check(lambda m, x: m.down(torch.cat([m.gate(x), m.few.expand(2, 3, -1)], -1)), 11, 12, nn.LayerNorm(8))
