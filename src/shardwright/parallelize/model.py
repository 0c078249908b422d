"""`parallelize_model`: one rank's part of any `nn.Module`, split by the flow of its data.

The plan is made from a trace, which knows no group (`trace`, `decide`, `planning`); `placing` makes the rank's module.
"""

from typing import Any, Literal

from torch import nn

from shardwright.comm.group import Group
from shardwright.comm.planned import PlannedGroup
from shardwright.errors import UnsupportedError, UsageError
from shardwright.parallelize.attributes import without_data
from shardwright.parallelize.graph import traced_model
from shardwright.parallelize.placing import hook, local_copy, place, place_simply, watch
from shardwright.parallelize.plan import Plan
from shardwright.parallelize.planning import Planned, own_demands, plan_flow
from shardwright.parallelize.rehearsal import compare_factors, rehearse
from shardwright.parallelize.sharding import ATTRIBUTE, Sharding, refuse_split
from shardwright.parallelize.simple import plan_simply
from shardwright.parallelize.trace import TRACING, Trace, trace


def parallelize_model(
    model: nn.Module,
    group: Group,
    example_inputs: Any = None,
    split_axis: Literal["auto", 0, 1] = "auto",
    gather_output: bool = True,
    rules: Literal["classical"] | None = None,
) -> nn.Module:
    """This rank's part of `model`, called as the model is, with whole inputs and outputs on every rank.

    example_inputs: a `Trace`, or what `trace` takes: a tuple of positional arguments, a dict of keywords. The model is
    left as it was; the result has its class, its state-dict names, and tensors of its own. `result.sharding.plan` says
    what is split, what moves, and why the rest is whole. `full_state_dict` and `load_full_state_dict` gather and cut.
    """
    _check_kinds(model, group)
    refuse_split(model)
    _check(split_axis, rules, gather_output=gather_output)
    with TRACING:
        traced = example_inputs if isinstance(example_inputs, Trace) else trace(model, example_inputs)
        rule = rules or split_axis
        if rule != "auto":
            simple = plan_simply(traced, group.size, rule, gather_output=gather_output)
            part = local_copy(model, simple.plan, traced, group.rank)
            return _finished(place_simply(part, simple, group), simple.plan, traced, group)
        planned = _rehearsed(model, traced, group.size, gather_output=gather_output)
        part = local_copy(model, planned.plan, traced, group.rank)
    if planned.places is None:
        part = traced_model(part, traced, planned, group, gather_output=gather_output)
    else:
        part = place(part, planned, group, gather_output=gather_output)
        hook(part, planned, group)
    watch(part, planned, traced, group)
    return _finished(part, planned.plan, traced, group)


def make_plan(
    model: nn.Module,
    traced: Trace,
    ranks: int,
    split_axis: Literal["auto", 0, 1] = "auto",
    gather_output: bool = True,
    rules: str | None = None,
) -> Plan:
    """The plan alone, as `parallelize_model` makes it: no group, no weights."""
    _check(split_axis, rules, gather_output=gather_output)
    with TRACING:
        if rules is not None or split_axis != "auto":
            rule: Any = rules or split_axis
            return plan_simply(traced, ranks, rule, gather_output=gather_output).plan
        return _rehearsed(model, traced, ranks, gather_output=gather_output).plan


def _rehearsed(model: nn.Module, traced: Trace, ranks: int, *, gather_output: bool) -> Planned:
    """The plan for so many ranks, each rank's part of it rehearsed."""
    planned = plan_flow(model, traced, ranks, gather_output=gather_output)
    if planned.places is None or ranks == 1:
        return planned
    demanded = own_demands(traced, planned.decision, planned.places)
    bare = without_data(model)
    seen = set()
    for rank in range(ranks):
        sizes = tuple((want(planned.placement, rank)) for found in demanded.values() for _, want in found.values())
        if sizes in seen:
            continue
        seen.add(sizes)
        part = local_copy(bare, planned.plan, traced, rank)
        part = place(part, planned, PlannedGroup(rank, ranks), gather_output=gather_output)
        try:
            rehearse(part, traced, demanded, planned.placement, rank)
            if rank == 0:  # whose sizes are other than the whole's, if any rank's are
                compare_factors(part, traced, planned.decision.flow, rank)
        except UnsupportedError as error:
            return plan_flow(model, traced, ranks, gather_output=gather_output, obstacle=str(error))
    return planned


def _finished(part: nn.Module, plan: Plan, traced: Trace, group: Group) -> nn.Module:
    names = {name.removeprefix("model."): first for name, first in traced.names.items()}
    setattr(part, ATTRIBUTE, Sharding(plan, group, names))
    return part


def _check_kinds(model: object, group: object) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError("model", type(model).__name__, "it is no nn.Module", "pass the module to split")
    if not isinstance(group, Group):
        remedy = "pass SingleGroup(), the group that ThreadGroup.run gives, or TorchGroup.of(process_group)"
        raise UsageError("group", type(group).__name__, "it is no group of ranks", remedy)


def _check(split_axis: object, rules: object, *, gather_output: bool) -> None:
    if split_axis not in ("auto", 0, 1) or isinstance(split_axis, bool):
        raise UsageError("split_axis", split_axis, "it is 'auto', 0 or 1", "leave it out to split by the flow of data")
    if rules not in (None, "classical"):
        raise UsageError("rules", rules, "there are no such rules", "leave them out, or pass 'classical'")
    if split_axis != "auto" and rules is not None:
        raise UsageError("split_axis", split_axis, "rules choose the axis themselves", "pass one of the two")
    if split_axis == 1 and not gather_output:
        constraint = "axis 1 gives every rank a partial sum, which is always reduced"
        raise UsageError("gather_output", gather_output, constraint, "leave it True, or split along axis 0")
