"""One pass over a traced graph: every node gets labels, by the rule of its operator (`rules`, `products`).

Which dims of which parameters carry labels is the caller's choice (`live`): all of them at first, then fewer, until
only what is split is left. Knows no ranks.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from shardwright.parallelize.labels import Findings, Parameter, compact, spread, varying

Value = Tensor | Parameter | None
Rule = Callable[["Flow", Node], Any]


class Flow:
    """The labels of every node of a graph, and what was found on the way."""

    def __init__(
        self,
        module: GraphModule,
        names: Mapping[str, str],
        live: Callable[[str, int], bool],
        rule_of: Callable[[Node], Rule],
    ) -> None:
        """names: attribute → the parameter's first name, so that tied weights are one parameter."""
        self.module, self.names, self.live = module, names, live
        self.findings = Findings()
        self.values: dict[Node, Any] = {}
        self.constants: dict[Node, Tensor] = {}
        for node in module.graph.nodes:
            if node.op == "get_attr":
                self.values[node] = self._attribute(node)
            elif node.op == "output":
                for argument in node.all_input_nodes:
                    self._leave(argument)
            elif node.op == "placeholder" or not self._labelled(node):
                self.values[node] = self._filled(node)
                self._keep_constant(node)
            elif node.target is operator.getitem:
                self.values[node] = self.values[node.args[0]][node.args[1]]
            else:
                made = rule_of(node)(self, node)
                self.values[node] = tuple(map(_known, made)) if isinstance(made, tuple) else _known(made)

    def value(self, argument: object) -> Any:
        """The labels of an argument; None for what is no tensor."""
        return self.values.get(argument) if isinstance(argument, Node) else None

    def labels(self, argument: object, node: Node) -> Tensor | None:
        """The labels of an argument as an activation: a parameter keeps those of its last dim, others are whole."""
        value = self.value(argument)
        if not isinstance(value, Parameter):
            return value if isinstance(value, Tensor) else None
        kept = None
        for layer in value.layers:
            if layer is not None:
                if varying(layer) == [layer.dim() - 1] or (kept is None and layer.dim() == 1):
                    kept = layer
                else:
                    self.findings.whole(node.name, layer)
        return kept

    def surrender(self, node: Node) -> Tensor | None:
        """An operator without a rule: every rank needs all that it reads."""
        for labels in self.reads(node):
            self.findings.whole(node.name, labels)
        return None

    def reads(self, node: Node) -> list[Tensor]:
        """All labels of what a node reads."""
        found: list[Tensor] = []
        for argument in node.all_input_nodes:
            value = self.values[argument]
            for one in value if isinstance(value, tuple) else (value,):
                found += [x for x in (one.layers if isinstance(one, Parameter) else (one,)) if x is not None]
        return found

    def _attribute(self, node: Node) -> Value:
        name = self.names.get(str(node.target))
        found = node.meta.get("val")
        if name is None or not isinstance(found, Tensor):
            if isinstance(found, Tensor):
                held: Any = self.module
                for part in str(node.target).split("."):
                    held = getattr(held, part)
                self.constants[node] = held
            return None
        shape = tuple(found.shape)
        layers = tuple(
            self.findings.source(name, dim, shape) if shape[dim] > 1 and self.live(name, dim) else None
            for dim in range(len(shape))
        )
        return Parameter(name, shape, layers)

    def _filled(self, node: Node) -> Tensor | None:
        """A tensor of one number has no place of its own: each element may go with whatever it meets."""
        shape: list[int] = list(shape_of(node))
        if str(node.target).split(".")[1:2] in (["zeros"], ["ones"], ["full"]) and len(shape) > 2 and 0 not in shape:
            labels = self.findings.fresh(torch.Size(shape).numel())
            return labels.view(*shape)
        return None

    def _labelled(self, node: Node) -> bool:
        for argument in node.all_input_nodes:
            value = self.values[argument]
            for one in value if isinstance(value, tuple) else (value,):
                if one is not None:
                    return True
        return False

    def _keep_constant(self, node: Node) -> None:
        if str(node.target) in ("aten.lift_fresh_copy.default", "aten.alias.default", "aten.clone.default"):
            source = node.args[0]
            if isinstance(source, Node) and source in self.constants:
                self.constants[node] = self.constants[source]

    def _leave(self, node: Node) -> None:
        value = self.values[node]
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, Parameter):
                for layer in one.layers:
                    self.findings.whole("output", layer)
            elif one is not None:
                self.findings.exits[node.name] = one


def _known(labels: Any) -> Any:
    """The same; of parts that every rank holds, joined or cut out of something joined, nothing."""
    if (
        isinstance(labels, Tensor)
        and labels.numel()
        and int(labels[(0,) * labels.dim()]) < 0
        and (compact(labels) < 0).all()
    ):
        return None
    return labels


def shape_of(argument: object) -> tuple[int, ...]:
    """The shape of a node's tensor; of a number, ()."""
    found = argument.meta.get("val") if isinstance(argument, Node) else None
    return tuple(found.shape) if isinstance(found, Tensor) else ()


def named(node: Node) -> dict[str, Any]:
    """A call's arguments by the names of its operator's schema, defaults left out."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    return {**dict(zip((one.name for one in schema), node.args, strict=False)), **node.kwargs}


def pointwise(
    flow: Flow, node: Node, operands: Sequence[tuple[Tensor | None, tuple[int, ...], object]]
) -> Tensor | None:
    """Elements combined one by one. operands: labels, shape, and the argument; shapes broadcast to the node's."""
    shape: tuple[int, ...] = torch.broadcast_shapes(*(size for _, size, _ in operands))  # type: ignore[no-untyped-call]
    split = [(labels, size) for labels, size, _ in operands if labels is not None]
    if not split:
        return None
    direct = [labels for labels, size in split if size == shape]
    out = spread(direct[0] if direct else max((x for x, _ in split), key=lambda x: x.numel()), shape)
    for labels in direct[1:]:
        flow.findings.tie(node.name, out, labels)
        out = torch.where(out < 0, labels, out)
    for labels, size in split:
        if size != shape:
            repeated = {
                len(shape) - 1 - i for i, n in enumerate(reversed(shape)) if i >= len(size) or size[-1 - i] != n
            }
            if repeated.isdisjoint(varying(out)):
                flow.findings.tie(node.name, out, labels)
            else:
                flow.findings.need(node.name, labels, out)
    for found, size, argument in operands:
        if found is None and isinstance(argument, Node):
            flow.findings.entries.append((node.name, argument.name))
            dims = [len(shape) - 1 - i for i, n in enumerate(reversed(size)) if n > 1]
            if set(varying(out)) <= set(dims):  # one owner would be no help: the other ranks have it too
                flow.findings.whole(node.name, out if varying(out) else None)
            flow.findings.unite(node.name, out, dims)
    return out
