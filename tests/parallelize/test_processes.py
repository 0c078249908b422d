"""The same part of a model on ranks that are processes: over shared memory and over gloo."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.parallelize.twins import call
from tests.parallelize.zoo import build

from shardwright.comm.group import Group
from shardwright.parallelize.model import parallelize_model
from shardwright.testing.ranks import on_gloo, on_processes


def largest_errors(group: Group, name: str) -> list[float]:
    """Of the output, and of a gradient that backward sums over the ranks (a norm before attention)."""
    torch.set_num_threads(1)
    model, inputs = build(name)
    part = parallelize_model(model, group, inputs)
    errors = []
    for one in (model, part):
        one.zero_grad()
        y = call(one, inputs)
        y.square().mean().backward()
        first = next(p.grad for p in one.parameters() if p.dim() == 1 and p.grad is not None)
        errors.append((y.detach(), first))
    return [(a - b).abs().max().item() for a, b in zip(*errors, strict=True)]


@pytest.mark.parametrize("run", [on_processes, on_gloo])
def test_two_processes_against_the_whole_model(run: Callable[..., Any]) -> None:
    """Nine query heads on two ranks, float64: only the order of sums differs."""
    for found in run(2, largest_errors, "llama, uneven"):
        assert max(found) < 1e-12, found
