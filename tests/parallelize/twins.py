"""The one distributed body of these tests: a split model beside its unsharded twin."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.comm.group import Group
from shardwright.comm.recording import RecordingGroup
from shardwright.parallelize.model import parallelize_model
from shardwright.parallelize.plan import Plan
from shardwright.parallelize.sharding import full_state_dict, sharding_of
from shardwright.parallelize.trace import Trace, trace
from shardwright.testing.ranks import on_threads

STEPS = 3


def first_tensor(output: Any) -> Tensor:
    """The logits of a model's output, or the output."""
    return output if isinstance(output, Tensor) else output.logits if hasattr(output, "logits") else output[0]


def call(model: nn.Module, inputs: Any) -> Tensor:
    return first_tensor(model(**inputs) if isinstance(inputs, dict) else model(*inputs))


def train(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Three steps of SGD with momentum on a loss that weighs every output differently; the outputs."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    outputs = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        y = call(model, inputs)
        weights = torch.arange(y.numel(), dtype=y.dtype).sin().view_as(y)
        (y * weights).mean().backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


def check_against_twin(group: Group, model: nn.Module, traced: Trace, inputs: Any, expected: list[Tensor], state: Any,
                       tolerance: float) -> Plan:  # fmt: skip
    """Outputs of three steps and all parameters after them, so that every gradient took part; calls as planned."""
    recording = RecordingGroup(group)
    part = parallelize_model(model, recording, traced)
    plan = sharding_of(part).plan
    training = part.training
    with torch.no_grad():
        call(part.eval(), inputs)
    part.train(training)
    assert [(one.op, one.bytes) for one in recording.calls] == [(m.op, m.bytes[group.rank]) for m in plan.moves]
    for step, (got, want) in enumerate(zip(train(part, inputs), expected, strict=True)):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=lambda m, s=step: f"step {s}: {m}")
    whole = full_state_dict(part)
    assert list(whole) == list(state)
    for name, tensor in state.items():
        torch.testing.assert_close(
            whole[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    return plan


def compare(model: nn.Module, inputs: Any, ranks: int, tolerance: float = 1e-9,
            twin: Callable[[nn.Module], nn.Module] = deepcopy) -> Plan:  # fmt: skip
    """Split `model` over threads, train it three steps, and compare with its twin; the plan."""
    traced = trace(model, inputs)
    alone = twin(model)
    expected = train(alone, inputs)
    state = alone.state_dict()
    return on_threads(ranks, check_against_twin, model, traced, inputs, expected, state, tolerance)[0]
