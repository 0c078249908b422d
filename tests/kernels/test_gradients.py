"""The local gradients' memory order, and the places offered for them; their values are in the operators' tests."""

import pytest
import torch
from torch import Tensor

from shardwright.comm.single import SingleGroup
from shardwright.kernels import gradients
from shardwright.kernels.column_linear import copied_linears
from shardwright.kernels.embedding import embedding
from shardwright.kernels.matmul_all_reduce import matmul_all_reduce


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


def products(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    if kind == "column":
        return copied_linears(x, [(weight, None)], SingleGroup())[0]
    if kind == "row":
        return matmul_all_reduce(x, weight.T, SingleGroup())
    return embedding(torch.tensor([2, 0, 2, 7, -1]), weight, 0)


@pytest.mark.parametrize("kind", ["column", "row", "embedding"])
def test_a_gradient_is_laid_where_its_owner_wants_it(kind: str) -> None:
    """Once: the offer is used up, and a second backward adds to what is there. Bits are those of a gradient without."""
    x, weight = torch.arange(20.0).view(5, 4).sin(), torch.arange(12.0).view(3, 4).cos().requires_grad_()
    products(x, weight, kind).square().sum().backward()
    assert weight.grad is not None
    expected, weight.grad = weight.grad, None
    place = torch.full((3, 4), float("nan"))
    gradients.offer(weight, place.view(3, 4))
    for times in (1, 2):
        products(x, weight, kind).square().sum().backward()
        assert weight.grad is not None
        assert weight.grad.data_ptr() == place.data_ptr()
        assert torch.equal(place, expected * times)


def test_two_products_of_one_weight_do_not_write_over_each_other() -> None:
    """A tied table is looked up and multiplied by: one of the two gets the place, and autograd adds them up."""
    weight, place = torch.arange(12.0).view(3, 4).cos().requires_grad_(), torch.full((3, 4), float("nan"))

    def loss() -> Tensor:
        x = products(torch.ones(5, 4), weight, "embedding")
        return products(products(x, weight, "column") @ weight, weight, "row").square().sum()

    (expected,) = torch.autograd.grad(loss(), weight)
    gradients.offer(weight, place)
    (found,) = torch.autograd.grad(loss(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # another order of three float32 terms


def test_the_place_of_a_weight_is_not_taken_by_a_part_of_it() -> None:
    """Of the first columns only a slice of the gradient is known; a turned square is not the weight."""
    for part in (lambda w: w[:, :3].T, lambda w: w[:3].T, lambda w: w.T[:, :3]):
        weight, place = torch.ones(4, 4, requires_grad=True), torch.full((4, 4), 7.0)
        gradients.offer(weight, place.view(4, 4))
        x2 = part(weight)
        matmul_all_reduce(torch.ones(2, x2.shape[0]), x2, SingleGroup()).sum().backward()
        assert weight.grad is not None
        assert (place == 7).all()
        assert gradients.withdraw(weight) is not None


def test_a_place_of_another_dtype_is_left_alone() -> None:
    weight = torch.ones(3, 4, requires_grad=True)
    gradients.offer(weight, torch.zeros(3, 4))
    gradient = gradients.of_weight(torch.ones(2, 3).double(), torch.ones(2, 4).double(), weight)
    assert gradient.dtype == torch.float64
    assert gradients.withdraw(weight) is not None
