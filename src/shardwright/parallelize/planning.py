"""From a trace to a plan for so many ranks: cuts, moves, settings. Knows no group."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn
from torch.fx import Node

from shardwright.errors import UnsupportedError
from shardwright.layout.partition import Range
from shardwright.parallelize.attention import calls_the_interface
from shardwright.parallelize.attributes import Demands, Settings, demands, solve
from shardwright.parallelize.chains import Chain
from shardwright.parallelize.decide import Decision, decide
from shardwright.parallelize.labels import varying
from shardwright.parallelize.placement import Placement, ranges
from shardwright.parallelize.plan import MODULES, Cut, Move, Plan
from shardwright.parallelize.sites import Sites, sites
from shardwright.parallelize.trace import Trace, owner


@dataclass(frozen=True)
class Planned:
    """A plan and what applying it needs beside it; places is None where the traced graph runs."""

    plan: Plan
    decision: Decision
    placement: Placement
    places: Sites | None
    settings: Settings
    dropouts: dict[str, Tensor]


def plan_flow(model: nn.Module, trace: Trace, ranks: int, *, gather_output: bool, obstacle: str = "") -> Planned:
    """The plan that the flow of data gives. obstacle: why the modules' own code cannot run, if that is known."""
    decision = decide(trace)
    placement = Placement(decision, ranks)
    _check_picks(trace, decision, placement)
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
    carried = set(places.together) if places else set()
    plan = Plan(
        ranks,
        tuple(_described(chain, trace) for chain in decision.chains),
        _cuts(decision, placement, trace),
        tuple(_moves(decision, placement, trace, carried, gather_output=gather_output)),
        decision.whole,
        {path: {".".join(name): values for name, values in found.items()} for path, found in settings.items() if found},
        indexed,
        runs,
        _notes(model, trace) if runs == MODULES else (),
    )
    dropouts = {
        owner(node): decision.flow.values[node]
        for node in trace.graph.graph.nodes
        if str(node.target) == "aten.dropout.default" and decision.flow.values[node] is not None
    }
    return Planned(plan, decision, placement, places, settings, dropouts)


def _check_picks(trace: Trace, decision: Decision, placement: Placement) -> None:
    """An index by numbers of the trace must find the same places on every rank."""
    flow = decision.flow
    for node in trace.graph.graph.nodes:
        labels = flow.values.get(node.args[0]) if str(node.target) == "aten.index.Tensor" else None
        if not isinstance(labels, Tensor):
            continue
        picks = [(dim, flow.constants[x]) for dim, x in enumerate(node.args[1]) if x in flow.constants]
        for dim, numbers in ((dim, x) for dim, x in picks if dim in varying(labels)):
            size = labels.shape[dim]
            for rank in range(placement.ranks):
                held = placement.held_along(labels, dim, rank).tolist()
                for number in numbers.reshape(-1).tolist():
                    at = number if number >= 0 else len(held) + number
                    if not 0 <= at < len(held) or held[at] != number % size:
                        parts = min(len(chain.granules) for chain in decision.chains)
                        lacking = f"{node.name} picks place {number} of {size}, which rank {rank} lacks"
                        raise UnsupportedError(f"tp={placement.ranks}: {lacking}; use at most {parts} ranks")


def _notes(model: nn.Module, trace: Trace) -> tuple[str, ...]:
    """Random numbers that stay torch's own."""
    modules = dict(model.named_modules())
    drawing = [
        owner(node)
        for node in trace.graph.graph.nodes
        if str(node.target) == "aten.dropout.default"
        and node.args[1]
        and not isinstance(modules[owner(node)], nn.Dropout)
    ]
    if not drawing:
        return ()
    return (f"dropout by function in {drawing[0]}: each rank draws its own in training; set its probability to 0",)


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
    decision: Decision, placement: Placement, trace: Trace, carried: set[str], *, gather_output: bool
) -> list[Move]:
    nodes: dict[str, Node] = {node.name: node for node in trace.graph.graph.nodes}
    moves = []
    for chain in decision.chains:
        for name in (one for one in chain.consumers if one not in carried):
            value = nodes[name].meta["val"]
            moves.append(Move("all_reduce", name, (value.numel() * value.element_size(),) * placement.ranks))
        for name in chain.exits if gather_output else ():
            labels, value = decision.flow.findings.exits[name], nodes[name].meta["val"]
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
