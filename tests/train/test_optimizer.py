"""AdamW over flat shares against torch's own, and the learning rate's shape."""

import pytest
import torch
from torch import nn

from shardwright.train.flat import FlatParameters
from shardwright.train.optimizer import ShardedAdamW, learning_rate
from shardwright.train.recipe import OptimizerPart

SETTINGS = OptimizerPart(lr=0.05, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)


def model_of() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 7)).double()
    for at, parameter in enumerate(model.parameters()):
        parameter.data.copy_((torch.arange(parameter.numel()) + at).double().sin().view_as(parameter))
    return model


@pytest.mark.parametrize("ranks", [1, 3])
def test_updates_are_those_of_torch_with_decay_on_matrices_only(ranks: int) -> None:
    """float64 to rounding, five updates, each share updated by itself."""
    twin, model = model_of(), model_of()
    matrices = [parameter for parameter in twin.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in twin.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.9), eps=1e-6)
    flat = FlatParameters(dict(model.named_parameters()))
    shares = flat.shares(ranks)
    ours = [ShardedAdamW(flat, shares.range(rank), SETTINGS) for rank in range(ranks)]
    x = torch.arange(12.0, dtype=torch.float64).cos().view(2, 6)
    for _ in range(5):
        flat.grad.zero_()
        adamw.zero_grad()
        for one in (twin, model):
            one(x).square().sum().backward()
        adamw.step()
        for share in ours:
            share.step(0.05)
    for one, other in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_masters_keep_what_half_types_lose() -> None:
    """A thousand updates of a hundredth of bfloat16's step each move a parameter by all of them."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    flat = FlatParameters({"x": parameter})
    optimizer = ShardedAdamW(flat, (0, 4), OptimizerPart(lr=1e-4, weight_decay=0.0))
    flat.grad.fill_(1.0)
    for _ in range(1000):
        optimizer.step(1e-4)
    assert float(optimizer.vectors["weight"][0]) == pytest.approx(0.9, rel=1e-3)
    assert float(parameter[0].detach()) == pytest.approx(0.9, rel=2**-8)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    settings = OptimizerPart(lr=1.0, min_lr=0.1, warmup=4)
    rates = [learning_rate(settings, step, 25) for step in range(25)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[14] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_a_settled_second_moment_stays_and_bounds_every_move() -> None:
    """By the formula in float64: m / sqrt(v) with v, and its bias, as after three updates; an element whose gradients
    were none until then moves by the learning rate and no more.
    """
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    flat = FlatParameters({"x": parameter})
    optimizer = ShardedAdamW(
        flat, (0, 3), OptimizerPart(lr=0.1, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.0), settled=3
    )
    gradients = torch.tensor([[0.3, -0.4, 0.0], [0.2, 0.1, 0.0], [0.5, 0.2, 0.0], [0.1, -0.3, 2.0]]).double()
    for gradient in gradients[:3]:
        flat.grad.copy_(gradient)
        optimizer.step(0.1)
    before, square = parameter.detach().clone(), optimizer.vectors["exp_avg_sq"].clone()
    flat.grad.copy_(gradients[3])
    optimizer.step(0.1)
    assert torch.equal(optimizer.vectors["exp_avg_sq"], square)
    average = sum(0.2 * 0.8 ** (3 - at) * gradient for at, gradient in enumerate(gradients)) / (1 - 0.8**4)
    size = (sum(0.1 * 0.9 ** (2 - at) * gradient**2 for at, gradient in enumerate(gradients[:3])) / (1 - 0.9**3)).sqrt()
    expected = before - 0.1 * (average / (size + 1e-8)).clamp(-1, 1)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)
    assert float(before[2] - parameter[2].detach()) == pytest.approx(0.1)
