"""Dropout: the same draws whoever makes them, the right share of zeros, the same mask on the way back."""

import pytest
import torch

from shardwright.errors import UsageError
from shardwright.layers.dropout import Dropout


def test_the_mask_does_not_depend_on_how_rows_are_dealt_out() -> None:
    """Bit for bit: rows 3…6 drawn alone, as another rank's or another batch's, are those of the whole."""
    x = torch.ones(10, 6)
    whole = Dropout(0.4, seed=1, step=7)(x, "here", 0)
    assert torch.equal(Dropout(0.4, seed=1, step=7)(x[3:7], "here", 3), whole[3:7])
    assert torch.equal(Dropout(0.4, seed=1, step=7, first_row=3)(x[3:7], "here", 0), whole[3:7])
    for other in (Dropout(0.4, seed=2, step=7), Dropout(0.4, seed=1, step=8)):
        assert not torch.equal(other(x, "here", 0), whole)
    assert not torch.equal(Dropout(0.4, seed=1, step=7)(x, "there", 0), whole)


def test_a_share_of_p_is_zeroed_and_the_mean_stays() -> None:
    """40 000 draws: the share has a deviation of 0.0023; five of them."""
    y = Dropout(0.3, seed=0, step=0)(torch.ones(200, 200, dtype=torch.float64), "x", 0)
    assert float((y == 0).double().mean()) == pytest.approx(0.3, abs=0.0115)
    assert set(y.unique().tolist()) == {0.0, 1 / 0.7}


def test_the_gradient_passes_where_the_value_did() -> None:
    x = torch.ones(5, 8, requires_grad=True)
    y = Dropout(0.5, seed=3, step=1)(x, "x", 0)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    Dropout(0.5, seed=3, step=1)(torch.ones(5, 8), "x", 0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_probability_of_one_is_refused() -> None:
    with pytest.raises(UsageError, match=r"dropout=1.0: a probability below 1"):
        Dropout(1.0, seed=0, step=0)
