"""The counter-based generator: its distributions, and that nothing but the coordinates decides a value.

Seeds are fixed, so that the statistical tests give the same verdict every time; each bound is what a fair generator
passes with a probability of at least 99.9 %.
"""

import math

import pytest
import torch
from torch import Tensor

from shardwright.layers import random
from shardwright.layout.spec import Piece

COUNT = 100_000
INDEX = torch.arange(COUNT)
KOLMOGOROV = 1.95 / math.sqrt(COUNT)
"""Distance from the true distribution function that 99.9 % of fair samples stay within."""


def distance(sample: Tensor, cumulative: Tensor) -> float:
    """Kolmogorov and Smirnov's: `cumulative` is the true distribution function at the sorted sample."""
    count = len(sample)
    above = torch.arange(1, count + 1, dtype=torch.float64) / count - cumulative
    below = cumulative - torch.arange(count, dtype=torch.float64) / count
    return max(above.max().item(), below.max().item())


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_uniform_is_uniform(seed: int) -> None:
    sample = random.uniform(seed, "x", 0, INDEX).sort().values
    assert distance(sample, sample) < KOLMOGOROV
    assert 0 < sample[0] < sample[-1] < 1


@pytest.mark.parametrize("seed", [0, 1])
def test_normal_is_normal(seed: int) -> None:
    sample = random.normal(seed, "x", 0, INDEX).sort().values
    assert distance(sample, torch.special.ndtr(sample)) < KOLMOGOROV
    assert sample.isfinite().all()


def test_gumbel_is_gumbel_and_draws_from_a_softmax() -> None:
    sample = random.gumbel(0, "x", 0, INDEX).sort().values
    assert distance(sample, (-(-sample).exp()).exp()) < KOLMOGOROV
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -3.0], dtype=torch.float64)
    noise = random.gumbel(0, "token", 7, torch.arange(5 * COUNT).view(COUNT, 5))
    counts = torch.bincount((logits + noise).argmax(1), minlength=5).double()
    expected = logits.softmax(0) * COUNT
    chi_square = ((counts - expected).square() / expected).sum().item()
    assert chi_square < 18.5  # 99.9 % at 4 degrees of freedom


@pytest.mark.parametrize(("first", "second"), [
    ((0, "a", 0), (0, "b", 0)),
    ((0, "a", 0), (1, "a", 0)),
    ((0, "a", 0), (0, "a", 1)),
    ((1, "1a", 0), (11, "a", 0)),
    ((0, "a1", 1), (0, "a", 11)),
    ((0, "layers.1", 0), (0, "layers.11", 0)),
])  # fmt: skip
def test_other_seeds_names_and_steps_are_independent(first: tuple[int, str, int], second: tuple[int, str, int]) -> None:
    """Chi-square on a 10 x 10 table of pairs: 99 degrees of freedom, 148.2 is its 99.9 % point."""
    x, y = (random.uniform(*key, INDEX) for key in (first, second))
    cells = torch.bincount((10 * x).long() * 10 + (10 * y).long(), minlength=100).double()
    assert ((cells - COUNT / 100).square() / (COUNT / 100)).sum() < 148.2


@pytest.mark.parametrize("stride", [1, 2, 3, 64, 576, 49_152])
def test_neighbours_are_independent(stride: int) -> None:
    """The same table for elements a row, or several, apart."""
    x, y = (random.uniform(0, "weight", 0, INDEX + start) for start in (0, stride))
    cells = torch.bincount((10 * x).long() * 10 + (10 * y).long(), minlength=100).double()
    assert ((cells - COUNT / 100).square() / (COUNT / 100)).sum() < 148.2


def test_a_value_depends_on_its_own_coordinates_only() -> None:
    """Alone, in another order, in another shape, at indices beyond 2^32: bit for bit."""
    for draw in (random.uniform, random.normal, random.gumbel):
        whole = draw(5, "x", 3, INDEX[:600])
        assert torch.equal(draw(5, "x", 3, INDEX[:600].flip(0)).flip(0), whole)
        assert torch.equal(draw(5, "x", 3, INDEX[:600].view(20, 30)).flatten(), whole)
        assert draw(5, "x", 3, torch.tensor(17)) == whole[17]
        far = draw(5, "x", 3, torch.tensor([2**40, 2**40 + 1, 17]))
        assert far[0] != far[1]
        assert far[2] == whole[17]


def test_nothing_is_drawn_from_torchs_generator() -> None:
    before = torch.get_rng_state()
    random.normal(0, "x", 0, INDEX)
    random.gumbel(0, "x", 0, INDEX)
    assert torch.equal(torch.get_rng_state(), before)


def test_published_values_of_splitmix64() -> None:
    """Its first outputs from state 1234567, as published with the reference code, as our mixing function gives them."""
    state = torch.tensor([(1234567 + (i + 1) * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63 for i in range(3)])
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [value % 2**64 for value in random._mix(state).tolist()] == published


def test_global_index_counts_in_the_whole_tensor() -> None:
    piece = Piece("x", (4, 6), (((1, 3),), ((0, 1), (4, 6))), ((0, 2), (0, 3)), (0,))
    assert random.global_index(piece).tolist() == [[6, 10, 11], [12, 16, 17]]
    assert random.global_index(Piece("x", (), (), (), (0,))).tolist() == 0
