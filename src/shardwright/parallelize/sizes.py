"""One model's graph twice: with the example's sizes as numbers, and with symbols for them. Where both agree, the second
runs at every size that its guards allow; where they do not, the first runs at the example's sizes alone.

A symbol stands for 1 too only if the graph traced with 1 in its place is the same: code may branch there unseen.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import SymFloat, SymInt, Tensor
from torch.fx import GraphModule, Node

from shardwright.errors import UnsupportedError
from shardwright.parallelize.inputs import Size

Values = Mapping[sympy.Symbol, int]
Retrace = Callable[[list[list[int]]], GraphModule]
"""The graph with the sizes of its inputs as given."""


@dataclass(frozen=True)
class Free:
    """A graph to run.

    names: node of the traced graph → the node here · sizes: of each input · ones: sets of symbols that may stand for 1
    together · why: why all sizes are those of the example, or nothing · guard: fails for tensors it is not for.
    """

    graph: GraphModule
    names: Mapping[str, str]
    sizes: tuple[tuple[Size, ...], ...]
    ones: frozenset[frozenset[str]] = frozenset()
    why: str = ""
    guard: Callable[..., None] | None = None


def fixed(graph: GraphModule, why: str) -> Free:
    """The traced graph itself, for the example's sizes."""
    names = {node.name: node.name for node in graph.graph.nodes}
    return Free(graph, names, tuple(tuple(map(int, x.shape)) for x in _inputs(graph)), why=why)


def freed(traced: GraphModule, symbolic: GraphModule, retrace: Retrace) -> Free:
    """The graph with symbols, if it is the traced one at the example's sizes."""
    _tidy(symbolic)
    inputs = _inputs(symbolic)
    values = {n.node.expr: n.node.hint for x in inputs for n in x.shape if isinstance(n, SymInt)}
    values = {symbol: value for symbol, value in values.items() if isinstance(symbol, sympy.Symbol)}
    matched = agree(traced, symbolic, values)
    if matched is None:
        return fixed(traced, "its code takes another way where sizes are not known")

    def same(ones: frozenset[sympy.Symbol]) -> bool:
        there = values | dict.fromkeys(ones, 1)
        try:
            other = retrace([[int(number(n, there) or 0) for n in x.shape] for x in inputs])
        except UnsupportedError:
            return False
        return agree(other, symbolic, there) is not None

    sets = {frozenset({symbol}) for symbol in values} | {frozenset(values)}
    ones = frozenset(frozenset(map(str, one)) for one in sets if one and same(one))
    sizes = tuple(tuple(_size(n) for n in x.shape) for x in inputs)
    names = {a.name: b.name for a, b in matched.items()}
    guard = next((symbolic.get_submodule(str(n.target)) for n in symbolic.graph.nodes if n.op == "call_module"), None)
    return Free(symbolic, names, sizes, ones, guard=guard)


def _size(n: int | SymInt) -> Size:
    known = number(n, {})
    return str(n) if known is None else int(known)


def agree(one: GraphModule, other: GraphModule, values: Values) -> dict[Node, Node] | None:
    """Each node of one graph with its partner in the other, where symbols stand for values; None: they differ."""
    first, second = list(_acting(one, values)), list(_acting(other, values))
    if len(first) != len(second):
        return None
    matched: dict[Node, Node] = {}
    for a, b in zip(first, second, strict=True):
        matched[a] = b
        held = a.op == "get_attr"
        if a.op != b.op or (held and not _same_held(one, a, other, b, values)):
            return None
        if a.op == "call_function" and a.target != b.target:
            return None
        if not held and not _alike((a.args, dict(a.kwargs)), (b.args, dict(b.kwargs)), matched, values):
            return None
    return matched


def number(x: Any, values: Values) -> int | float | None:
    """A size or a factor where symbols stand for values; None: it depends on something else."""
    if not isinstance(x, SymInt | SymFloat):
        return x if isinstance(x, int | float) else None
    found = sympy.sympify(x.node.expr).xreplace({symbol: sympy.Integer(value) for symbol, value in values.items()})
    if not found.is_number:
        return None
    return int(found) if isinstance(x, SymInt) else float(found)


def _acting(graph: GraphModule, values: Values) -> Iterator[Node]:
    """Nodes that make tensors; not those that only compute sizes, or pass a tensor on."""
    for node in graph.graph.nodes:
        made = isinstance(node.meta.get("val"), Tensor | tuple | list) or node.op in ("get_attr", "output")
        if made and node.op != "call_module" and not passes(node, values):
            yield node


def passes(node: Node, values: Values) -> bool:
    """Whether a node gives its input as it is: another name for it, or a slice that takes all."""
    if node.target is torch.ops.aten.alias.default:
        return True
    if node.target is not torch.ops.aten.slice.Tensor or (len(node.args) > 4 and node.args[4] != 1):
        return False
    before, after = (x.meta["val"].shape for x in (node.all_input_nodes[0], node))
    return [number(n, values) if values else n for n in before] == [number(n, values) if values else n for n in after]


def _tidy(graph: GraphModule) -> None:
    """Without the nodes that pass a tensor on whatever the sizes."""
    for node in list(graph.graph.nodes):
        if passes(node, {}):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.graph.erase_node(node)


def _alike(a: Any, b: Any, matched: Mapping[Node, Node], values: Values) -> bool:
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_alike(x, y, matched, values) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[k], b[k], matched, values) for k in a)
    if isinstance(b, Node) and isinstance(b.meta.get("val"), SymInt | SymFloat):
        return not isinstance(a, Node) and number(b.meta["val"], values) == a
    if isinstance(a, Node) and isinstance(b, Node):
        return matched.get(_through(a, values)) is _through(b, values)
    return type(a) is type(b) and bool(a == b)


def _through(node: Node, values: Values) -> Node:
    while passes(node, values):
        node = node.all_input_nodes[0]
    return node


def _same_held(one: GraphModule, a: Node, other: GraphModule, b: Node, values: Values) -> bool:
    x, y = (operator.attrgetter(str(node.target))(graph) for graph, node in ((one, a), (other, b)))
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x is y or (x.shape == y.shape and x.dtype == y.dtype and x.device == y.device and torch.equal(x, y))
    if isinstance(x, GraphModule) and isinstance(y, GraphModule):
        return agree(x, y, values) is not None
    return x is y


def _inputs(graph: GraphModule) -> list[Any]:
    return [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
