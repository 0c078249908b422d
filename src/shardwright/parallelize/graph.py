"""Where a model's own forward cannot run on parts: the traced graph does, with local constants and collectives put in.

The graph is the trace's, copied; parameters and buffers are looked up in the rank's module, so that their names, moves
between dtypes and optimisers work as ever. Sizes of inputs are followed as far as `sizes` has proven them.
"""

import operator
from collections.abc import Iterator, Mapping
from copy import copy, deepcopy
from functools import reduce
from typing import Any, final

import torch
from torch import SymInt, Tensor, nn
from torch.fx import Graph, GraphModule, Node

from shardwright.comm import regions
from shardwright.comm.group import Group
from shardwright.errors import UnsupportedError
from shardwright.parallelize.constants import constants
from shardwright.parallelize.draws import draws_of
from shardwright.parallelize.flow import named
from shardwright.parallelize.labels import compact, varying
from shardwright.parallelize.planning import Planned, in_other_mode
from shardwright.parallelize.sites import differentiable, parameter_of
from shardwright.parallelize.sizes import Free, fixed, number
from shardwright.parallelize.trace import Trace
from shardwright.parallelize.traced import Program, TracedModel, inputs_of

_aten = torch.ops.aten


@final
class Collective(nn.Module):
    """A node of the local graph: one region. how: reduce | copy | gather."""

    def __init__(self, how: str, group: Group, tag: str, dim: int = 0, widths: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.how, self.group, self.tag, self.dim, self.widths = how, group, tag, dim, widths

    def forward(self, x: Tensor) -> Tensor:
        """The whole of `x`, or `x` itself with its gradient summed."""
        if self.how == "gather":
            return regions.gather(x, self.dim, self.widths, self.group, self.tag)
        return (regions.reduce if self.how == "reduce" else regions.copy)(x, self.group, self.tag)


def traced_model(part: nn.Module, trace: Trace, planned: Planned, group: Group, *, gather_output: bool) -> nn.Module:
    """The rank's module running the graph on its parts: in the mode it was traced in, and in the other if it can be."""
    model, mode = TracedModel(part), trace.model.training
    model.programs[mode] = _program(model, trace, planned, group, gather_output=gather_output)
    try:
        other = in_other_mode(planned, trace)
        model.programs[not mode] = _program(model, trace.opposite, other, group, gather_output=gather_output)
    except UnsupportedError as error:
        model.programs[not mode] = str(error)
    return model


def _program(model: nn.Module, trace: Trace, planned: Planned, group: Group, *, gather_output: bool) -> Program:
    """At all sizes the graph is right for, or, where a split stands in the way, at the example's."""
    try:
        local = _Local(model, trace, trace.free, planned, group)
    except UnsupportedError as error:
        local = _Local(model, trace, fixed(trace.graph, str(error)), planned, group)
    module = local.communicating(gather_output=gather_output)
    return Program(module, local.free, inputs_of(trace.model, trace.inputs))


@final
class _Local:
    """A graph being made a rank's. nodes: a node of the trace → the node here."""

    def __init__(self, model: nn.Module, trace: Trace, free: Free, planned: Planned, group: Group) -> None:
        self.trace, self.free, self.planned, self.group = trace, free, planned, group
        self.flow, self.placement = planned.decision.flow, planned.placement
        self.module = _copied(trace, free.graph)
        self.module.model = model
        here = {node.name: node for node in self.module.graph.nodes}
        self.nodes = {name: here[mine] for name, mine in free.names.items() if mine in here}
        self.made = {node.name: node.meta.get("val") for node in free.graph.graph.nodes}
        for node in trace.graph.graph.nodes:
            if node.op == "call_function":
                self._check_sizes(node)
                self._resize(node)

    def communicating(self, *, gather_output: bool) -> GraphModule:
        """With what is drawn drawn by place, and collectives put in."""
        self._draw()
        original = {node.name: node for node in self.trace.graph.graph.nodes}
        copies: dict[str, Node] = {}
        for name, operand in dict.fromkeys(self.flow.findings.entries):
            source = original[operand]
            if parameter_of(self.trace, source) is None and differentiable(self.trace, source):
                if operand not in copies:
                    copies[operand] = self._after(self._of(operand), Collective("copy", self.group, operand))
                self._of(name).replace_input_with(self._of(operand), copies[operand])
        for chain in self.planned.decision.chains:
            for name in chain.consumers:
                self._reduce(name)
            for name in chain.exits if gather_output else ():
                self._gather(name)
        self.module.graph.lint()
        self.module.recompile()
        return self.module

    def _of(self, name: str) -> Node:
        """The node here; of one that only passes its input on, the one of that."""
        node: Node = next(node for node in self.trace.graph.graph.nodes if node.name == name)
        while node.name not in self.nodes:
            node = node.all_input_nodes[0]
        found: Node = self.nodes[node.name]
        return found

    def _check_sizes(self, node: Node) -> None:
        """A dim that follows the inputs' sizes is split in the same parts at every size, or not at all."""
        labels = self.flow.values.get(node)
        made = self.made.get(self.free.names.get(node.name, ""))
        if not isinstance(labels, Tensor) or not isinstance(made, Tensor):
            return
        for dim in varying(labels):
            if number(made.shape[dim], {}) is None:
                parts, small = _factor(made.shape[dim]), compact(labels).movedim(dim, 0)
                again, slow = small.reshape(-1, parts, *small.shape[1:]), small.reshape(parts, -1, *small.shape[1:])
                if not bool((again == again[:1]).all() or (slow == slow[:, :1]).all()):
                    raise UnsupportedError(f"{node.name}: what is split there follows the inputs' sizes")

    def _resize(self, node: Node) -> None:
        """This rank's integers in one call."""
        if node.target is _aten.split.Tensor and self.flow.values[node] is not None:
            self._split(node)
            return
        found = constants(self.flow, node)
        wanted = {at: (value, want(self.placement, self.group.rank)) for at, (value, want) in found.items()}
        if node.name not in self.nodes:
            if any(value != want for value, want in wanted.values()):
                raise UnsupportedError(f"{node.name}: its bounds follow the inputs' sizes")
            return
        here, made = self.nodes[node.name], self.flow.values[node]
        here.args = tuple(self._replaced(here.args, here, iter(range(1 << 20)), wanted))
        views = ("aten.view.", "aten.reshape.", "aten._unsafe_view.")
        if str(node.target).startswith(views) and isinstance(made, Tensor):
            self._state_sizes(here, self.placement.size(made, self.group.rank))

    def _split(self, node: Node) -> None:
        """By one size, a part of none would be missing."""
        here, dim = self.nodes[node.name], named(node).get("dim", 0)
        if isinstance(here.args[1], Node):
            raise UnsupportedError(f"{node.name}: its parts follow the inputs' sizes")
        sizes = [self.placement.size(x, self.group.rank)[dim] for x in self.flow.values[node]]
        here.target, here.args = _aten.split_with_sizes.default, (here.args[0], sizes, dim)

    def _state_sizes(self, here: Node, sizes: tuple[int, ...]) -> None:
        """Of a tensor without elements -1 says nothing."""
        given: Any = here.args[1]
        if 0 in sizes and -1 in given:
            at = list(given).index(-1)
            follows = self.made[here.name].shape[at]
            size = sizes[at] if number(follows, {}) is not None else self._computed(follows, here)
            here.args = (here.args[0], [*given[:at], size, *given[at + 1 :]])

    def _computed(self, size: SymInt, here: Node) -> Node:
        """A product of the inputs' sizes, computed in the graph."""
        graph, factor = self.module.graph, size.node.expr
        inputs = {
            str(n): (node, dim)
            for node in graph.nodes
            if node.op == "placeholder"
            for dim, n in enumerate(node.meta["val"].shape)
        }
        powers = factor.as_powers_dict()
        if not all(str(base) in inputs and power > 0 for base, power in powers.items()):
            raise UnsupportedError(f"{here.name}: nothing of it is here, and its size is {factor}")
        with graph.inserting_before(here):
            sizes = [inputs[str(base)] for base, power in powers.items() for _ in range(int(power))]
            nodes = [graph.call_function(_aten.sym_size.int, one) for one in sizes]
            return reduce(lambda a, b: graph.call_function(operator.mul, (a, b)), nodes)

    def _replaced(
        self, arguments: Any, here: Node, count: Iterator[int], wanted: Mapping[int, tuple[int, int]]
    ) -> Iterator[Any]:
        """The same arguments with the integers at these positions replaced."""
        for one in arguments:
            if isinstance(one, bool):
                yield one
            elif isinstance(one, int):
                yield wanted.get(next(count), (one, one))[1]
            elif isinstance(one, Node) and isinstance(one.meta.get("val"), SymInt):
                at = next(count)
                yield self._scaled(one, here, *wanted[at]) if at in wanted else one
            elif isinstance(one, tuple | list):
                yield list(self._replaced(one, here, count, wanted))
            else:
                yield one

    def _scaled(self, size: Node, here: Node, value: int, want: int) -> Node:
        """`size x want / value` for a size that is `value` at the example's sizes and `want` on this rank."""
        if value == want:
            return size
        if _factor(size.meta["val"]) * want % value:
            raise UnsupportedError(f"{here.name}: a size that follows the inputs' is split")
        graph = self.module.graph
        with graph.inserting_before(here):
            product = graph.call_function(operator.mul, (size, want))
            return graph.call_function(operator.floordiv, (product, value))

    def _after(self, node: Node, module: nn.Module) -> Node:
        name = f"{node.name}_{type(module).__name__}".lower()
        self.module.add_submodule(name, module)
        with self.module.graph.inserting_after(node):
            return self.module.graph.call_module(name, (node,))

    def _draw(self) -> None:
        """Dropout by place in the whole tensor, if the graph was traced in training."""
        for one in draws_of(self.trace, self.flow) if self.trace.model.training else ():
            here = self.nodes[one.node]
            if not one.by_place_in(self.planned.plan.runs) or (one.function == "dropout" and not here.args[2]):
                continue
            p = float(here.args[1]) if one.function == "dropout" else 0.0
            whole = self._after(here, one.by_place(p, self.placement, self.group.rank))
            here.replace_all_uses_with(whole)
            whole.args, whole.kwargs = (here.args[:1], {}) if one.function == "dropout" else (here.args, here.kwargs)
            self.module.graph.erase_node(here)
            self.nodes[one.node] = whole

    def _gather(self, name: str) -> None:
        labels = self.flow.findings.exits[name]
        (dim,) = varying(labels)
        widths = tuple(self.placement.size(labels, rank)[dim] for rank in range(self.group.size))
        node = self._of(name)
        whole = self._after(node, Collective("gather", self.group, name, dim, widths))
        next(iter(reversed(self.module.graph.nodes))).replace_input_with(node, whole)

    def _reduce(self, name: str) -> None:
        """Sum a product over the ranks; its bias is added once, after."""
        graph, node, bias = self.module.graph, self._of(name), None
        convolution = str(node.target).startswith("aten.conv")
        if node.target is _aten.linear.default and len(node.args) > 2:
            bias, node.args = node.args[2], node.args[:2]
        elif node.target is _aten.addmm.default:
            bias, node.args, node.target = node.args[0], node.args[1:], _aten.mm.default
        elif convolution and len(node.args) > 2:
            bias, node.args = node.args[2], (*node.args[:2], None, *node.args[3:])
        users = list(node.users)
        whole = self._after(node, Collective("reduce", self.group, name))
        if isinstance(bias, Node):
            with graph.inserting_after(whole):
                sizes = [-1] + [1] * (len(node.meta["val"].shape) - 2 if convolution else 0)
                shaped = graph.call_function(_aten.view.default, (bias, sizes))
            with graph.inserting_after(shaped):
                whole = graph.call_function(_aten.add.Tensor, (whole, shaped))
        for user in users:
            user.replace_input_with(node, whole)


def _factor(size: Any) -> int:
    """The number in a size that follows the inputs': of `6 x batch` it is 6."""
    return int(size.node.expr.as_coeff_Mul()[0]) if isinstance(size, SymInt) else int(size)


def _copied(trace: Trace, source: GraphModule) -> GraphModule:
    """The graph with what it holds beside the model: constants and graphs within."""
    graph = Graph()
    graph.output(graph.graph_copy(source.graph, {}))
    program = GraphModule(nn.Module(), Graph())
    for node in graph.nodes:
        target = str(node.target)
        if node.op != "get_attr" or (target.startswith("model.") and _held(trace, target)):
            continue
        held: Any = operator.attrgetter(target)(source)
        node.target = target.replace(".", "_") + "_constant"
        if isinstance(held, nn.Module):
            program.add_submodule(node.target, deepcopy(held))
        else:
            program.register_buffer(node.target, held.detach().clone(), persistent=False)
    for node in list(graph.nodes):
        if str(node.target) == "aten._assert_tensor_metadata.default" or node.op == "call_module":
            graph.erase_node(node)  # the guard is asked before
    graph.set_codegen(copy(source.graph._codegen))
    program.graph = graph
    return program


def _held(trace: Trace, target: str) -> bool:
    return target in trace.names or target in trace.buffers
