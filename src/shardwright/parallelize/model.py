"""`parallelize_model`: one rank's part of any `nn.Module`, split by the flow of its data.

The plan is made from a trace, which knows no group (`trace`, `decide`, `planning`); this file makes the rank's module.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from shardwright.comm.group import Group
from shardwright.comm.planned import PlannedGroup
from shardwright.errors import UnsupportedError
from shardwright.layers.dropout import Dropout
from shardwright.parallelize.attributes import set_own, without_data
from shardwright.parallelize.graph import places_of, traced_model
from shardwright.parallelize.modules import ColumnGather, CopyHook, RowSplit
from shardwright.parallelize.partial import watch_gradients
from shardwright.parallelize.plan import Cut, Plan
from shardwright.parallelize.planning import Planned, own_demands, plan_flow, widths
from shardwright.parallelize.rehearsal import rehearse
from shardwright.parallelize.sharding import ATTRIBUTE, Sharding, refuse_split, rows
from shardwright.parallelize.sites import parameter_of
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
    refuse_split(model)
    with TRACING:
        traced = example_inputs if isinstance(example_inputs, Trace) else trace(model, example_inputs)
        planned = make_plan(model, traced, group.size, gather_output=gather_output)
        part = _local_copy(model, planned.plan, traced, group.rank)
    if planned.places is None:
        part = traced_model(part, traced, planned, group, gather_output=gather_output)
    else:
        _place(part, planned, group, gather_output=gather_output)
        _hook(part, planned, group)
    _watch(part, planned, traced, group)
    names = {name.removeprefix("model."): first for name, first in traced.names.items()}
    setattr(part, ATTRIBUTE, Sharding(planned.plan, group, names))
    return part


def make_plan(model: nn.Module, traced: Trace, ranks: int, *, gather_output: bool = True) -> Planned:
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
        part = _local_copy(bare, planned.plan, traced, rank)
        _place(part, planned, PlannedGroup(rank, ranks), gather_output=gather_output)
        try:
            rehearse(part, traced, demanded, planned.placement, rank)
        except UnsupportedError as error:
            return replace(planned, plan=replace(planned.plan, runs=str(error), settings={}), places=None)
    return planned


def _local_copy(model: nn.Module, plan: Plan, traced: Trace, rank: int) -> nn.Module:
    """A copy of the model whose parameters are this rank's parts."""
    cuts = {cut.parameter: cut for cut in plan.cuts}
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        memo[id(parameter)] = nn.Parameter(_part(parameter.detach(), cuts.get(name), rank), parameter.requires_grad)
    return deepcopy(model, memo)


def _part(whole: Tensor, cut: Cut | None, rank: int) -> Tensor:
    if cut is None:
        return whole.clone()
    return whole.index_select(cut.dim, rows(cut, rank).to(whole.device)).contiguous()


def _place(part: nn.Module, planned: Planned, group: Group, *, gather_output: bool) -> None:
    """Put integers, modules and hooks where the plan has them."""
    places, cuts = planned.places, {cut.parameter: cut for cut in planned.plan.cuts}
    assert places is not None
    for path, values in planned.settings.items():
        set_own(part.get_submodule(path), {name: mine[group.rank] for name, mine in values.items()})
    for product in places.rows:
        part.set_submodule(product.path, RowSplit(part.get_submodule(product.path), product, group))
    for product in places.gathers:
        cut = cuts[f"{product.path}.{product.weight}"]
        new = ColumnGather(part.get_submodule(product.path), product, group, widths(cut) if gather_output else None)
        part.set_submodule(product.path, new)
    for path, module in list(part.named_modules()):
        if isinstance(module, nn.Dropout):
            labels = planned.dropouts.get(path)
            dropout = Dropout(module.p, path, places=places_of(labels, planned.placement, group.rank))
            part.set_submodule(path, dropout.train(module.training))


def _hook(part: nn.Module, planned: Planned, group: Group) -> None:
    """Sum gradients where a value that every rank holds enters a chain."""
    places = planned.places
    assert places is not None
    gathered = {product.path for product in places.gathers}
    for path in places.outputs:
        part.get_submodule(path).register_forward_hook(CopyHook(group, path).after)
    for path in places.inputs:
        if path not in gathered:
            part.get_submodule(path).register_forward_pre_hook(CopyHook(group, path).before)


def _watch(part: nn.Module, planned: Planned, traced: Trace, group: Group) -> None:
    """Sum gradients of parameters that several ranks hold and each sees its share of."""
    flow = planned.decision.flow
    nodes = {node.name: node for node in traced.graph.graph.nodes}
    met = {parameter_of(traced, nodes[operand]) for _, operand in flow.findings.entries}
    used = {source.parameter for source in flow.findings.sources}
    cuts = {cut.parameter: cut for cut in planned.plan.cuts}
    watch_gradients(part, cuts, frozenset(name for name in met | used if name), group)
