"""Dropout under `torch.utils.checkpoint`: what is computed again drops what it dropped before."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from tests.parallelize import zoo
from tests.parallelize.twins import call
from torch import Tensor, nn

from shardwright.comm.group import Group
from shardwright.comm.single import SingleGroup
from shardwright.errors import UsageError
from shardwright.parallelize.dropout import Dropout
from shardwright.parallelize.model import parallelize_model
from shardwright.parallelize.trace import Trace, trace
from shardwright.testing.ranks import on_processes


def dropping() -> tuple[nn.Module, Any, Trace]:
    """A GPT-2 that drops in modules, and inside attention."""
    model, inputs = zoo.build("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    model.config.attn_pdrop = 0.3
    return model, inputs, trace(model.train(), inputs)


def gradients(part: Any, inputs: Any) -> dict[str, Tensor]:
    """Of two forwards whose backwards run first to last: neither the last call nor the first is the one repeated."""
    first, second = call(part, inputs).square().mean(), call(part, inputs).mean()
    first.backward()
    second.backward()
    return {name: parameter.grad for name, parameter in part.named_parameters() if parameter.grad is not None}


def check(group: Group, reentrant: bool) -> None:
    model, inputs, traced = dropping()
    kept = parallelize_model(deepcopy(model), group, traced)
    again = parallelize_model(model, group, traced)
    again.activation_checkpointing_enable({"use_reentrant": reentrant})
    expected, found = gradients(kept, inputs), gradients(again, inputs)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_without(reentrant: bool) -> None:
    """float64: 1e-12 is the order of sums; another mask moves them by a tenth."""
    check(SingleGroup(), reentrant)


def test_gradients_are_those_without_over_processes() -> None:
    on_processes(2, check, False)


def test_what_cannot_be_told_apart_is_refused() -> None:
    """Without the generator's state nothing says which call is repeated."""
    dropout, x = Dropout(0.5, "here"), torch.ones(4, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(
        lambda x: dropout(x).square(), x, use_reentrant=False, preserve_rng_state=False
    )
    with pytest.raises(UsageError, match=r"preserve_rng_state=<another state>: here cannot tell which dropout"):
        y.sum().backward()
