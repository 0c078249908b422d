"""A rank's module: parameters cut, and modules, integers and hooks put where a plan has them."""

from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from shardwright.comm.group import Group
from shardwright.parallelize.attention import index_attention
from shardwright.parallelize.attributes import set_own
from shardwright.parallelize.draws import Draw, places_of
from shardwright.parallelize.dropout import DrawnByPlace, Dropout, Places
from shardwright.parallelize.modules import (
    Carried,
    ColumnGather,
    CopyHook,
    RowDeferred,
    RowScatter,
    RowSplit,
    VocabularySplit,
)
from shardwright.parallelize.partial import watch_gradients
from shardwright.parallelize.plan import MODULES, Cut, Plan
from shardwright.parallelize.planning import Planned, widths
from shardwright.parallelize.sharding import rows
from shardwright.parallelize.simple import Simple
from shardwright.parallelize.sites import inside, parameter_of
from shardwright.parallelize.trace import Trace


def local_copy(model: nn.Module, plan: Plan, traced: Trace, rank: int) -> nn.Module:
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


def place(part: nn.Module, planned: Planned, group: Group, *, gather_output: bool) -> nn.Module:
    """Put integers and modules where the plan has them; the part, or what takes its place if it is one product."""
    places, cuts = planned.places, {cut.parameter: cut for cut in planned.plan.cuts}
    assert places is not None
    for path, values in planned.settings.items():
        set_own(part.get_submodule(path), {name: mine[group.rank] for name, mine in values.items()})
    for path, index in planned.plan.indexed.items():
        if index[group.rank]:
            index_attention(part.get_submodule(path), index[group.rank])
    carried = {name: Carried() for pair in places.together.items() for name in pair}
    carried |= {first: carried[second] for first, second in places.together.items()}
    for product in places.rows:
        old = part.get_submodule(product.path)
        deferred = product.node in places.together
        row = RowDeferred(old, product, group, carried[product.node]) if deferred else None
        part.set_submodule(product.path, row or RowSplit(old, product, group, carried.get(product.node)))
    for product in places.gathers:
        cut = cuts[planned.names[f"{inside(product.path)}{product.weight}"]]
        new = ColumnGather(part.get_submodule(product.path), product, group, widths(cut) if gather_output else None)
        if not product.path:
            return new
        part.set_submodule(product.path, new)
    held = {one.path: places_of(one.labels, planned.placement, group.rank) for one in planned.draws if one.inside}
    _seed_dropouts(part, held)
    return part


def _seed_dropouts(part: nn.Module, cut: dict[str, Places]) -> None:
    """Dropout whose mask does not depend on the split."""
    for path, module in list(part.named_modules()):
        if isinstance(module, nn.Dropout) and path:
            part.set_submodule(path, Dropout(module.p, path, places=cut.get(path)).train(module.training))


def hook(part: nn.Module, planned: Planned, group: Group) -> None:
    """Sum gradients where a value that every rank holds enters a chain."""
    places = planned.places
    assert places is not None
    for path in places.outputs:
        part.get_submodule(path).register_forward_hook(CopyHook(group, path).after)
    for path in places.inputs:
        part.get_submodule(path).register_forward_pre_hook(CopyHook(group, path).before, with_kwargs=True)
    _hook_draws(part, planned, group.rank)


def _hook_draws(part: nn.Module, planned: Planned, rank: int) -> None:
    """What modules draw by function in their own code is drawn by place."""
    draws: dict[str, list[Draw]] = {}
    for one in planned.draws:
        if one.by_place_in(MODULES) and not one.inside:
            draws.setdefault(one.path, []).append(one)
    for path, mine in draws.items():
        hooks = DrawnByPlace([one.by_place(0.0, planned.placement, rank) for one in mine])
        part.get_submodule(path).register_forward_pre_hook(hooks.before)
        part.get_submodule(path).register_forward_hook(hooks.after, always_call=True)


def watch(part: nn.Module, planned: Planned, traced: Trace, group: Group) -> None:
    """Sum gradients of parameters that several ranks hold and each sees its share of."""
    flow = planned.decision.flow
    nodes = {node.name: node for node in traced.graph.graph.nodes}
    met = {parameter_of(traced, nodes[operand]) for _, operand in flow.findings.entries}
    used = {source.parameter for source in flow.findings.sources}
    cuts = {cut.parameter: cut for cut in planned.plan.cuts}
    watch_gradients(part, cuts, frozenset(name for name in met | used if name), group)


def place_simply(part: nn.Module, simple: Simple, group: Group) -> nn.Module:
    """Put a module of its form where each is."""
    for product, form, partition in simple.forms:
        old = part.get_submodule(product.path)
        if form == "vocabulary":
            start, stop = partition.range(group.rank)
            new: nn.Module = VocabularySplit(old, product, start, stop, group)
        elif form == "row":
            new = RowScatter(old, product, group, partition.widths)
        else:
            new = ColumnGather(old, product, group, None if product.path in simple.local else partition.widths)
            new.register_forward_pre_hook(CopyHook(group, product.path).before, with_kwargs=True)
        if not product.path:  # the model is one linear
            return new
        part.set_submodule(product.path, new)
    _seed_dropouts(part, {})
    return part
