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


def test_weights_of_attention_have_the_same_mask_however_heads_and_sequences_are_dealt_out() -> None:
    """Bit for bit: heads 1…3 of 5, and the second of two sequences drawn as the first of another batch."""
    x = torch.ones(5, 4, 4)
    whole = Dropout(0.0, seed=1, step=7, attention=0.4).weights(x, "here", 3, (0, 5), 5)
    part = Dropout(0.0, seed=1, step=7, attention=0.4).weights(x[1:4], "here", 3, (1, 4), 5)
    assert torch.equal(part, whole[1:4])
    moved = Dropout(0.0, seed=1, step=7, first_row=3, attention=0.4).weights(x, "here", 0, (0, 5), 5)
    assert torch.equal(moved, whole)
    both = Dropout(0.0, seed=1, step=7, attention=0.4).weights(torch.ones(2, 5, 4, 4), "here", 3, (0, 5), 5)
    second = Dropout(0.0, seed=1, step=7, attention=0.4).weights(x, "here", 3 + 4, (0, 5), 5)
    assert torch.equal(both, torch.stack((whole, second)))
    assert set(whole.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}


def test_no_two_weights_share_a_draw() -> None:
    """A share of p is zeroed overall (60 000 draws, five deviations of 0.002), and no head or row repeats another's."""
    y = Dropout(0.0, seed=0, step=0, attention=0.3).weights(torch.ones(6, 100, 100), "x", 0, (0, 6), 6)
    assert float((y == 0).double().mean()) == pytest.approx(0.3, abs=0.0095)
    assert len(y.view(600, 100).unique(dim=0)) == 600
