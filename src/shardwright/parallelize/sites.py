"""Where in the model's modules communication goes: which module multiplies, whose output enters a chain.

A chain begins where a value that every rank holds enters a product with a cut weight: its gradient is summed over the
ranks. It ends in a module that does nothing but that product (and its bias): one that reduces takes its place. Where
the model's modules have no such place, `UnsupportedError` says so, and the traced graph runs instead.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from shardwright.errors import UnsupportedError
from shardwright.parallelize.decide import Decision
from shardwright.parallelize.labels import compact
from shardwright.parallelize.record import Like
from shardwright.parallelize.rules import MOVING, SAME
from shardwright.parallelize.trace import Trace, owner


@dataclass(frozen=True)
class Product:
    """A module that multiplies by one parameter, under its own names. transposed: the weight is `[in, out]` · padding:
    the id whose row an embedding does not train, or -1.
    """

    path: str
    node: str
    weight: str
    bias: str | None
    transposed: bool
    padding: int = -1


@dataclass(frozen=True)
class Sites:
    """rows: modules that end a chain · gathers: modules whose output is gathered · gathered: the nodes, one a call of
    those · outputs: modules whose output enters chains · inputs: modules whose input does · together: node → the later
    node with which it is added at once, so that one all-reduce carries both.
    """

    rows: tuple[Product, ...]
    gathers: tuple[Product, ...]
    gathered: tuple[str, ...]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    together: dict[str, str]


def sites(trace: Trace, decision: Decision) -> Sites:
    """Find every place.

    Raises:
        UnsupportedError: one is inside a module's own code, where nothing can be put.
    """
    nodes = {node.name: node for node in trace.graph.graph.nodes}
    leaving = {
        source.parameter
        for chain in decision.chains
        for source in (chain.sources if chain.exits else ())
        if decision.classes.of[source.start] in chain.granules
    }
    rows = [product(trace, nodes[name]) for chain in decision.chains for name in chain.consumers]
    gathers = [
        product(trace, node)
        for node in nodes.values()
        if node.op == "call_function" and leaving & set(_weights(trace, node)) and _is_product(node)
    ]
    _check_gathered(trace, decision, {nodes[one.node] for one in gathers})
    entering: dict[Node, list[Node]] = {}
    for name, operand in decision.flow.findings.entries:
        outside = _outside(nodes[operand], nodes[name])
        if parameter_of(trace, nodes[operand]) is None and differentiable(trace, outside):
            entering.setdefault(outside, []).append(nodes[name])
    for source, users in entering.items():
        if not all(_is_product(user) for user in users):
            raise UnsupportedError(f"{owner(users[0])}: {source.name}, which every rank holds, meets what is split")
    outputs, inputs = _sums(trace, entering)
    gathered = tuple(one.node for one in gathers)
    together = _together(trace, nodes, decision)
    return Sites(_distinct(rows), _distinct(gathers), gathered, outputs, inputs, together)


def _check_gathered(trace: Trace, decision: Decision, gathered: set[Node]) -> None:
    """Nothing but these products and their biases meets what is gathered: behind them it is whole already."""
    own = {name for node in gathered for name in _weights(trace, node)}
    nodes = {node.name: node for node in trace.graph.graph.nodes}
    for chain in (one for one in decision.chains if one.exits):
        others = [one.parameter for one in chain.sources if one.parameter not in own]
        split = decision.classes.split(chain.granules)
        for name, operand in decision.flow.findings.entries:
            parameter, labels = parameter_of(trace, nodes[operand]), decision.flow.values[nodes[name]]
            if parameter and nodes[name] not in gathered and split[compact(labels).clamp(min=0).numpy()].any():
                others.append(parameter)
        if others:
            raise UnsupportedError(f"{others[0]} meets what would be gathered before it")


def _sums(trace: Trace, entering: dict[Node, list[Node]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Where gradients of what enters chains are summed, each once: behind the module that gives it, else before those
    that take it, which then do so at every call.
    """
    outputs = dict(entering)
    inputs: dict[str, None] = {}
    while True:
        found = [
            source
            for source, users in outputs.items()
            if not _whole_output(trace, source, users) or not inputs.keys().isdisjoint(map(owner, users))
        ]
        if not found:
            return tuple(dict.fromkeys(map(owner, outputs))), tuple(inputs)
        inputs |= dict.fromkeys(product(trace, user).path for source in found for user in outputs.pop(source))


def product(trace: Trace, node: Node) -> Product:
    """The module that does this product and nothing else."""
    path = owner(node)
    weight_at = {"linear": 1, "addmm": 2, "matmul": 1, "mm": 1, "embedding": 0}.get(_name(node))
    if weight_at is None:
        raise UnsupportedError(f"{path}: {_name(node)} ends a chain, and only products with a weight can")
    weight: Node = node.args[weight_at]  # type: ignore[assignment]
    transposed = _name(node) in ("addmm", "matmul", "mm")
    while weight.op != "get_attr" and _name(weight) in ("t", "numpy_T", "transpose", "mT"):
        weight, transposed = weight.args[0], not transposed  # type: ignore[assignment]
    name = parameter_of(trace, weight)
    mine = trace.nodes_of[path]
    biases = {found for one in mine for found in _weights(trace, one) if found != name}
    again = {one for one in mine if one.target is node.target and _by(trace, one, weight_at) == name}
    plain = all(one in again or _quiet(trace, one, biases) for one in mine) and _takes_one(trace, path)
    prefix = inside(path)
    here = [(full.removeprefix(prefix), first) for full, first in trace.names.items() if full.startswith(prefix)]
    held = {first: local for local, first in here if "." not in local}
    if weight.op != "get_attr" or not plain or len(biases) > 1 or name not in held or not biases <= held.keys():
        raise UnsupportedError(f"{path or 'the model'} does more than this product ({node.name}) in its own code")
    bias = held[biases.pop()] if biases else None
    padding = node.args[2] if _name(node) == "embedding" and len(node.args) > 2 else -1
    return Product(path, node.name, held[name], bias, transposed, int(str(padding)))


def _quiet(trace: Trace, node: Node, biases: set[str]) -> bool:
    """Whether a call beside the product changes no value: views of it, of the weight, and the addition of a bias."""
    name, first = _name(node), node.args[0]
    before, after = (one.meta.get("val") for one in (first, node)) if isinstance(first, Node) else (None, None)
    if name in ("view", "reshape", "_unsafe_view"):
        return isinstance(before, Tensor) and isinstance(after, Tensor) and before.shape[-1:] == after.shape[-1:]
    if name == "to":
        return isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype
    if name in ("t", "numpy_T", "transpose", "mT"):
        return parameter_of(trace, node) is not None
    if name == "add":
        return not node.kwargs and bool(biases & set(_weights(trace, node)))
    return name in ("alias", "contiguous", "_assert_tensor_metadata")


def _takes_one(trace: Trace, path: str) -> bool:
    """Whether a module is always called with one tensor and nothing else, and gives one of the same leading dims."""
    calls = [call for call in trace.modules if call.path == path]
    alone = all(len(one.arguments) == 1 and isinstance(one.arguments[0], Like) and not one.keywords for one in calls)
    given = {one.arguments[0].shape for one in calls} if alone else set()
    made = [node for node in trace.nodes_of[path] if any(owner(user) != path for user in _uses(node))]
    leading = {shape[:-1] for shape in given} | given  # of a product, and of ids
    return alone and all(tuple(node.meta["val"].shape)[:-1] in leading for node in made)


def _together(trace: Trace, nodes: dict[str, Node], decision: Decision) -> dict[str, str]:
    """Sums over ranks that the model adds to each other and uses nowhere else (parallel blocks of one norm), of modules
    that are called once: what one makes waits in it for the other. One with a hook, which would see it, is left alone.
    """
    consumers = {nodes[name] for chain in decision.chains for name in chain.consumers}
    calls = Counter(map(owner, consumers))
    hooked = {path for path in calls if trace.model.get_submodule(path)._forward_hooks}
    consumers = {one for one in consumers if calls[owner(one)] == 1 and owner(one) not in hooked}
    found: dict[str, str] = {}
    for first in consumers:
        end = _until_added(first)
        if end is None:
            continue
        others = [one for one in consumers if one is not first and _until_added(one) is end]
        if len(others) == 1 and first < others[0] and first.meta["val"].shape == others[0].meta["val"].shape:
            found[first.name] = others[0].name
    return found


def _until_added(node: Node) -> Node | None:
    """The addition that is the only use of a value, or of what merely passes it on."""
    passing = ("alias", "contiguous", "clone", "to", "view", "reshape")
    while len(uses := _uses(node)) == 1:
        if _name(uses[0]) in ("add", "add_") and not uses[0].kwargs:
            return uses[0]
        if _name(uses[0]) not in passing:
            return None
        node = uses[0]
    return None


def _distinct(products: list[Product]) -> tuple[Product, ...]:
    """One for each module, however often it is called."""
    return tuple({one.path: one for one in products}.values())


def _by(trace: Trace, node: Node, at: int) -> str | None:
    weight = node.args[at]
    return parameter_of(trace, weight) if isinstance(weight, Node) else None


def inside(path: str) -> str:
    """What the names in the trace of all that a module holds begin with."""
    return f"model.{path}." if path else "model."


def _whole_output(trace: Trace, source: Node, users: list[Node]) -> bool:
    """Whether a module's output is this value, all of whose uses enter chains: one sum of gradients serves them all."""
    path = owner(source)
    mine = [node for at, nodes in trace.nodes_of.items() if _within(at, path) for node in nodes]
    leaving = {node for node in mine for user in _uses(node) if not _within(owner(user), path) or user.op == "output"}
    calls = [call for call in trace.modules if call.path == path]
    reached = {end for use in _uses(source) for end in _ends(use)}
    return bool(path) and len(calls) == 1 and leaving == {source} and reached <= set(users)


def _ends(node: Node) -> Iterator[Node]:
    """Where a value ends up behind views of it."""
    if _name(node) in (*SAME, *MOVING):
        for use in _uses(node):
            yield from _ends(use)
    else:
        yield node


def _outside(operand: Node, user: Node) -> Node:
    """What a product reads, before the views that its own module makes of it."""
    while owner(operand) == owner(user) and _name(operand) in (*SAME, *MOVING):
        first = operand.args[0]
        if not isinstance(first, Node):
            break
        operand = first
    return operand


def parameter_of(trace: Trace, node: Node) -> str | None:
    """The parameter that a node is, or a view of."""
    while node.op == "call_function" and _name(node) in (*SAME, *MOVING) and isinstance(node.args[0], Node):
        node = node.args[0]
    return trace.names.get(str(node.target)) if node.op == "get_attr" else None


def differentiable(trace: Trace, node: Node) -> bool:
    """Whether a gradient may flow into this value: it depends on a parameter or on a floating input."""
    seen, rest = set[Node](), [node]
    while rest:
        at = rest.pop()
        found = at.meta.get("val")
        if at in seen or (isinstance(found, Tensor) and not found.is_floating_point()):
            continue
        seen.add(at)
        if at.op == "placeholder" or (at.op == "get_attr" and str(at.target) in trace.names):
            if isinstance(found, Tensor):
                return True
        elif not isinstance(at.target, torch._ops.HigherOrderOperator):
            rest += at.all_input_nodes
    return False


def _weights(trace: Trace, node: Node) -> list[str]:
    found = [parameter_of(trace, one) for one in node.all_input_nodes]
    return [name for name in found if name is not None]


def _uses(node: Node) -> list[Node]:
    return [user for user in node.users if _name(user) != "_assert_tensor_metadata"]


def _is_product(node: Node) -> bool:
    return _name(node) in ("linear", "addmm", "matmul", "mm", "bmm", "conv1d", "conv2d", "embedding")


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.") or not outer


def _name(node: Node) -> str:
    parts = str(node.target).split(".")
    return parts[1] if node.op == "call_function" and len(parts) > 1 else ""
