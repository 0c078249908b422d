"""Which chains are split: the largest set that can be, least communication first, and why the others stay whole.

A chain that an operator needs whole loses its labels, and the graph is walked again without them: what stood in the way
of others is now simply a value every rank holds. After two or three walks only chains that can be split are left.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor
from torch.fx import Node

from shardwright.errors import UnsupportedError
from shardwright.parallelize.chains import NOTHING, Chain, Classes, chains_of, classes_of
from shardwright.parallelize.flow import Flow, Rule, shape_of
from shardwright.parallelize.labels import WHOLE, compact, varying
from shardwright.parallelize.rules import custom_function, proven_rule, rule_of
from shardwright.parallelize.trace import Trace

Dims = set[tuple[str, int]]
"""(parameter, dim)."""


@dataclass(frozen=True)
class Decision:
    """flow: the last walk, where only what is split has labels · chains: what is split · whole: parameter → why not."""

    flow: Flow
    classes: Classes
    chains: tuple[Chain, ...]
    whole: dict[str, str]


def decide(trace: Trace, barred: Mapping[str, str] | None = None) -> Decision:
    """Choose what to split by the flow of data alone. barred: parameters that stay whole, and why.

    Raises:
        UnsupportedError: a custom autograd function would see a part of a dimension.
    """
    functions = {node: name for node in trace.graph.graph.nodes if (name := custom_function(node))}
    if functions:
        trusting = _decided(trace, rule_of, barred or {})
        for node, name in functions.items():
            if trusting.flow.reads(node):
                raise UnsupportedError(
                    f"{name}: a custom autograd function over a dimension that would be split, and nothing says how "
                    "its backward splits; write it with torch's operators, or leave its module out of the model"
                )
    return _decided(trace, proven_rule, barred or {})


def _decided(trace: Trace, rules: Callable[[Node], Rule], barred: Mapping[str, str]) -> Decision:
    dead: Dims = {(name, dim) for name in barred for dim in range(len(trace.shapes[name]))}
    whole = dict(barred)
    while True:
        flow, classes, chains = _walk(trace, dead, rules)
        failed = [chain for chain in chains if chain.obstacle not in ("", NOTHING)]
        if not failed:
            break
        for chain in failed:
            dead |= _dims(chain)
            for name in chain.parameters:
                whole.setdefault(name, chain.obstacle)
    nodes = {node.name: node for node in trace.graph.graph.nodes}
    chosen: list[Chain] = []
    taken: Dims = set()
    for chain in sorted((c for c in chains if c.granules), key=lambda chain: _price(chain, trace, nodes)):
        reason = _reluctance(chain, nodes, flow, classes)
        if not reason and (clash := {name for name, _ in taken} & set(chain.parameters)):
            reason = f"with it {min(clash)} would be cut along its other dim, which moves more"
        if reason:
            whole |= dict.fromkeys(chain.parameters, reason)
            continue
        chosen.append(chain)
        taken |= _dims(chain)
    return _final(trace, taken, whole, rules)


def again(trace: Trace, decision: Decision) -> Decision:
    """The same dims split in another graph of the model."""
    taken = {dim for chain in decision.chains for dim in _dims(chain)}
    return _final(trace, taken, decision.whole, proven_rule)


def _final(trace: Trace, taken: Dims, whole: dict[str, str], rules: Callable[[Node], Rule]) -> Decision:
    everything = {(name, dim) for name in trace.names.values() for dim in range(8)}
    flow, classes, chains = _walk(trace, everything - taken, rules)
    split = tuple(chain for chain in chains if not chain.obstacle)
    _keep_entries(flow, classes, split)
    cut = {name for chain in split for name in chain.parameters}
    names = dict.fromkeys(trace.names.values())
    return Decision(flow, classes, split, {n: whole.get(n, NOTHING) for n in names if n not in cut})


def _keep_entries(flow: Flow, classes: Classes, split: tuple[Chain, ...]) -> None:
    """A value that every rank holds enters a chain where it meets a rank's own; labels of zeros may be nobody's."""
    own = classes.split(granule for chain in split for granule in chain.granules)
    values = {node.name: labels for node, labels in flow.values.items() if isinstance(labels, Tensor)}
    flow.findings.entries = [
        (name, operand)
        for name, operand in flow.findings.entries
        if name in values and bool(own[compact(values[name]).clamp(min=WHOLE).reshape(-1).numpy()].any())
    ]


def _walk(trace: Trace, dead: Dims, rules: Callable[[Node], Rule]) -> tuple[Flow, Classes, list[Chain]]:
    flow = Flow(trace.graph, trace.names, lambda name, dim: (name, dim) not in dead, rules)
    classes = classes_of(flow.findings)
    return flow, classes, chains_of(flow.findings, classes)


def _dims(chain: Chain) -> Dims:
    return {(source.parameter, source.dim) for source in chain.sources}


def _price(chain: Chain, trace: Trace, nodes: dict[str, Node]) -> float:
    """Elements moved a forward for each element that is split."""
    moved = sum(prod(shape_of(nodes[name])) for name in (*chain.consumers, *chain.exits))
    return moved / max(1, sum(prod(trace.shapes[name]) for name in chain.parameters))


def _bytes(node: Node) -> int:
    return prod(shape_of(node)) * int(node.meta["val"].element_size())


def _reluctance(chain: Chain, nodes: dict[str, Node], flow: Flow, classes: Classes) -> str:
    """Why a chain that could be split is not: a lookup computes nothing; an output is joined in the ranks' order."""
    if any(str(nodes[name].target).startswith("aten.embedding") for name in chain.consumers):
        summed, gathered = (sum(_bytes(nodes[name]) for name in names) for names in (chain.consumers, chain.exits))
        if chain.exits:
            return (
                f"it is looked up too: cut by rows, a forward would sum {summed:,} bytes of lookups and gather "
                f"{gathered:,} of its products, and whole it moves none; rules='classical' cuts it"
            )
        return f"a lookup computes nothing, and cut by rows {summed:,} bytes of lookups would be summed in a forward"
    for name in chain.exits:
        labels = compact(flow.findings.exits[name])
        owners = classes.of[labels.numpy().reshape(-1)]
        runs = 1 + int((owners[1:] != owners[:-1]).sum())
        if chain.consumers or len(varying(labels)) != 1 or (labels < 0).any() or runs != len(set(owners.tolist())):
            return f"the model also returns it ({name})" if chain.consumers else f"{name} is no plain row of its parts"
    return ""
