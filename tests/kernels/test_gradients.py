"""The local gradients' memory order; their values are in the tests of the operators."""

import pytest
import torch

from shardwright.kernels import gradients


@pytest.mark.parametrize("transposed", [False, True])
def test_the_weights_gradient_lies_in_memory_as_the_weight_does(transposed: bool) -> None:
    """A linear passes `weight.T`; a gradient in another order would be copied at every step."""
    x2 = torch.ones(4, 5).T if transposed else torch.ones(5, 4)
    gradient = gradients.of_right(torch.ones(2, 3, 5), torch.ones(2, 3, 4), x2)
    assert (gradient.shape, gradient.stride()) == (x2.shape, x2.stride())


def test_gradients_are_wanted_where_autograd_records_them() -> None:
    leaf = torch.ones(1, requires_grad=True)
    assert gradients.wanted(None, torch.ones(1), leaf)
    assert not gradients.wanted(None, leaf.detach())
    with torch.no_grad():
        assert not gradients.wanted(leaf)
