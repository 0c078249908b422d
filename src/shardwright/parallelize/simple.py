"""Each module by itself: `split_axis` 0 or 1 for every linear, or the field's classical rule. No flow of data is asked.

axis 0: the weight's rows, a column-parallel linear whose output is gathered · axis 1: its columns, whose partial sums
are reduced · vocabulary: rows of an embedding's table.
"""

from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from shardwright.errors import UnsupportedError
from shardwright.layout.partition import Partition
from shardwright.parallelize.plan import Cut, Move, Plan
from shardwright.parallelize.sites import Product, inside, parameter_of, product
from shardwright.parallelize.trace import Trace

Rule = Literal[0, 1, "classical"]
Form = Literal["column", "row", "vocabulary"]


@dataclass(frozen=True)
class Simple:
    """A plan, and each module with its form; local: modules whose output stays a part."""

    plan: Plan
    forms: tuple[tuple[Product, Form, Partition], ...]
    local: frozenset[str]


def plan_simply(trace: Trace, ranks: int, rule: Rule, *, gather_output: bool) -> Simple:
    """The plan of `split_axis` or of `rules="classical"`."""
    nodes = [node for node in trace.graph.graph.nodes if node.op == "call_function"]
    dims: dict[str, set[int | None]] = {}
    found: list[tuple[Node, Product, Form, int]] = []
    whole = dict.fromkeys(trace.names.values(), "no linear multiplies by it alone")
    for node in nodes:
        for weight in {name for one in node.all_input_nodes if (name := parameter_of(trace, one))}:
            use = _form(trace, node, weight, rule)
            dims.setdefault(weight, set()).add(None if use is None else use[3])
            if use is not None:
                found.append(use)
    cuts: dict[str, Cut] = {}
    forms: dict[str, tuple[Product, Form, Partition]] = {}
    moves: list[Move] = []
    outputs = {one for node in trace.graph.graph.nodes if node.op == "output" for one in node.all_input_nodes}
    local = set()
    for node, one, form, dim in found:
        weight = str(trace.names[f"{inside(one.path)}{one.weight}"])
        if len(dims[weight]) > 1:
            whole[weight] = "its uses would cut it along different dims"
            continue
        size = trace.shapes[weight][dim]
        partition = Partition.balanced(size, ranks)
        forms[one.path] = (one, form, partition)
        bias = trace.names.get(f"{inside(one.path)}{one.bias}") if one.bias and form == "column" else None
        for name, at in ((weight, dim), *(((bias, 0),) if bias else ())):
            ranges = tuple((partition.range(rank),) if partition.widths[rank] else () for rank in range(ranks))
            cuts[name] = Cut(name, trace.shapes[name], at, ranges, trace.bytes_of(name))
            whole.pop(name, None)
        if form == "column" and not gather_output and node in outputs:
            local.add(one.path)
            continue
        value = node.meta["val"]
        total = value.numel() * value.element_size()
        mine = tuple(total // size * width for width in partition.widths) if form == "column" else (total,) * ranks
        moves.append(Move("all_gather" if form == "column" else "all_reduce", node.name, mine))
    chains = tuple(f"{one.path} by itself: {form}" for one, form, _ in forms.values())
    return Simple(
        Plan(ranks, chains, tuple(cuts.values()), tuple(moves), whole, {name: trace.size_of(name) for name in whole}),
        tuple(forms.values()),
        frozenset(local),
    )


def _form(trace: Trace, node: Node, weight: str, rule: Rule) -> tuple[Node, Product, Form, int] | None:
    """How a use of a weight is split, and along which of its dims; None: not."""
    try:
        one = product(trace, node)
    except UnsupportedError:
        return None
    if trace.names.get(f"{inside(one.path)}{one.weight}") != weight:
        return None
    embedding = str(node.target).startswith("aten.embedding")
    if embedding:
        return (node, one, "vocabulary", 0) if rule == "classical" else None
    rows, columns = trace.shapes[weight][::-1] if one.transposed else trace.shapes[weight]
    axis = (0 if rows > columns else 1) if rule == "classical" else rule
    dim = 1 - axis if one.transposed else axis
    return node, one, "column" if axis == 0 else "row", dim
