"""From a trace to a plan for so many ranks: cuts, moves, settings. Knows no group."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from torch import Tensor, nn
from torch.fx import Node

from shardwright.errors import UnsupportedError
from shardwright.layout.partition import Range
from shardwright.parallelize.attention import calls_the_interface
from shardwright.parallelize.attributes import Demands, Settings, demands, solve
from shardwright.parallelize.chains import Chain
from shardwright.parallelize.decide import Decision, again, decide
from shardwright.parallelize.draws import Draw, draws_of
from shardwright.parallelize.labels import compact
from shardwright.parallelize.misfits import misfit
from shardwright.parallelize.placement import Placement, ranges
from shardwright.parallelize.plan import MODULES, Cut, Move, Plan
from shardwright.parallelize.sites import Sites, sites
from shardwright.parallelize.trace import Trace, owner
from shardwright.parallelize.traced import inputs_of


@dataclass(frozen=True)
class Planned:
    """A plan and what applying it needs beside it; places is None where the traced graph runs."""

    plan: Plan
    decision: Decision
    placement: Placement
    places: Sites | None
    settings: Settings
    draws: tuple[Draw, ...]
    names: Mapping[str, str]


def plan_flow(model: nn.Module, trace: Trace, ranks: int, *, gather_output: bool, obstacle: str = "") -> Planned:
    """The plan that the flow of data gives. obstacle: why the modules' own code cannot run, if that is known."""
    decision, placement = _decided(trace, ranks)
    indexed = _by_index(model, trace, placement)
    if indexed:
        placement = Placement(decision, ranks, copies=False)
    runs, places, settings = MODULES, None, {}
    try:
        if obstacle:
            raise UnsupportedError(obstacle)
        places = sites(trace, decision)
        settings = solve(model, trace, own_demands(trace, decision, places), placement)
    except UnsupportedError as error:
        runs = str(error)
        placement, indexed = Placement(decision, ranks), {}
    draws = draws_of(trace, decision.flow)
    plan = Plan(
        ranks,
        tuple(_described(chain, trace) for chain in decision.chains),
        _cuts(decision, placement, trace),
        tuple(_moves(decision, placement, trace, places, gather_output=gather_output)),
        decision.whole,
        {name: trace.size_of(name) for name in decision.whole},
        {path: {".".join(name): values for name, values in found.items()} for path, found in settings.items() if found},
        indexed,
        runs,
        (*_sizes(trace, runs), *_notes(draws, runs)),
    )
    return Planned(plan, decision, placement, places, settings, draws, trace.names)


def in_other_mode(planned: Planned, trace: Trace) -> Planned:
    """The same plan on the graph of the model's other mode.

    Raises:
        UnsupportedError: there is no such graph, or it would be cut otherwise.
    """
    other = trace.opposite
    decision = again(other, planned.decision)
    placement = Placement(decision, planned.plan.ranks)
    if _cuts(decision, placement, other) != planned.plan.cuts:
        raise UnsupportedError("in that mode the data flows otherwise, and the cuts do not fit")
    return replace(planned, decision=decision, placement=placement)


def _decided(trace: Trace, ranks: int) -> tuple[Decision, Placement]:
    """What is split over so many ranks; a chain of which some rank would not find a place where it looks is whole."""
    barred: dict[str, str] = {}
    while True:
        decision = decide(trace, barred)
        placement = Placement(decision, ranks)
        wrong = _wrong(decision, placement)
        if wrong is None or not decision.chains:
            return decision, placement
        labels, why = wrong
        own = placement.classes.of[np.concatenate([compact(x).reshape(-1).clamp(min=0).numpy() for x in labels])]
        blamed = [
            chain
            for chain in decision.chains
            if any(np.isin(placement.classes.of[one.start : one.start + one.size], own).any() for one in chain.sources)
        ]
        for chain in blamed or decision.chains:
            barred |= dict.fromkeys(chain.parameters, why)


def _wrong(decision: Decision, placement: Placement) -> tuple[list[Tensor], str] | None:
    """Labels that cannot be dealt out so, and why."""
    if lost := placement.lost():
        pick, rank = lost
        numbers = ", ".join(map(str, pick.numbers))
        why = f"{pick.node} picks place {numbers} of {pick.labels.shape[pick.dim]}, which rank {rank} would not find"
        return [pick.labels], why
    if found := misfit(decision.flow, placement):
        node, labels, rank = found
        return labels, f"{node.name} would not find on rank {rank} what it needs together"
    return None


def _notes(draws: tuple[Draw, ...], runs: str) -> Iterator[str]:
    """Random numbers that stay torch's own."""
    for one in draws:
        if not one.by_place_in(runs):
            how = "each rank draws for its part" if one.labels is not None else "seed all ranks alike"
            yield f"{one.path or 'the model'} draws from torch's generator ({one.node}): {how}"


def _sizes(trace: Trace, runs: str) -> tuple[str, ...]:
    """Which sizes of its inputs a traced graph is for."""
    if runs == MODULES:
        return ()
    free = trace.free
    symbols = dict.fromkeys(size for sizes in free.sizes for size in sizes if isinstance(size, str))
    letters = dict(zip(symbols, "abcdefghijklmnopqrstuvwxyz", strict=False))
    named = inputs_of(trace.model, trace.inputs).order
    shapes = [", ".join(str(letters.get(str(size), size)) for size in sizes) for sizes in free.sizes]
    taken = "; ".join(f"{name} [{shape}]" for name, shape in zip(named, shapes, strict=True))
    return (f"the graph takes {taken}" + (f"; {free.why}" if free.why else ""),)


def _by_index(model: nn.Module, trace: Trace, placement: Placement) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Module path → each rank's query → KV index, if every module that needs one takes it; else none does."""
    nodes = {node.name: node for node in trace.graph.graph.nodes}
    found: dict[str, tuple[tuple[int, ...], ...]] = {}
    for name, index in placement.indexed.items():
        path = owner(nodes[name.split(".")[0]])
        if found.setdefault(path, index) != index:
            return {}
    kinds = {(type(model.get_submodule(path)), index): path for path, index in found.items()}
    return found if all(calls_the_interface(model, trace, path) for path in kinds.values()) else {}


def own_demands(trace: Trace, decision: Decision, places: Sites) -> dict[str, Demands]:
    """The constants in code that stays: not in modules that are replaced."""
    replaced = {product.path for product in (*places.rows, *places.gathers)}
    return {path: found for path, found in demands(trace, decision.flow).items() if path not in replaced}


def _cuts(decision: Decision, placement: Placement, trace: Trace) -> tuple[Cut, ...]:
    found = []
    for chain in decision.chains:
        for source in chain.sources:
            held = tuple(ranges(placement.rows(source, rank)) for rank in range(placement.ranks))
            everywhere: tuple[Range, ...] = ((0, source.size),)
            if any(mine != everywhere for mine in held) or placement.ranks == 1:
                size = trace.bytes_of(source.parameter)
                found.append(Cut(source.parameter, trace.shapes[source.parameter], source.dim, held, size))
    return tuple(found)


def _moves(
    decision: Decision, placement: Placement, trace: Trace, places: Sites | None, *, gather_output: bool
) -> list[Move]:
    """What is summed and gathered: outputs where the graph has them, or behind the modules that make them."""
    nodes: dict[str, Node] = {node.name: node for node in trace.graph.graph.nodes}
    consumers = [name for chain in decision.chains for name in chain.consumers]
    exits = [name for chain in decision.chains for name in chain.exits] if places is None else places.gathered
    moves = []
    for name in consumers:
        if places is None or name not in places.together:
            value = nodes[name].meta["val"]
            moves.append(Move("all_reduce", name, (value.numel() * value.element_size(),) * placement.ranks))
    for name in exits if gather_output else ():
        labels, value = decision.flow.values[nodes[name]], nodes[name].meta["val"]
        sizes = [prod(placement.size(labels, rank)) * value.element_size() for rank in range(placement.ranks)]
        moves.append(Move("all_gather", name, tuple(sizes)))
    order = {name: at for at, name in enumerate(nodes)}
    return sorted(moves, key=lambda move: order[move.at])


def _described(chain: Chain, trace: Trace) -> str:
    dims = {}
    for source in chain.sources:
        dims[source.parameter] = source.dim
    names = ", ".join(f"{name} (dim {dim})" for name, dim in dims.items())
    end = f"summed in {', '.join(chain.consumers)}" if chain.consumers else f"gathered from {', '.join(chain.exits)}"
    return f"{len(chain.granules)} parts: {names}; {end}"


def widths(cut: Cut) -> Sequence[int]:
    """How many places of the cut dim each rank holds."""
    return [sum(stop - start for start, stop in mine) for mine in cut.ranges]
