"""Where a model's own forward cannot run on parts: the traced graph does, with local constants and collectives put in.

The graph is the trace's, copied; parameters and buffers are looked up in the rank's module, so that their names, moves
between dtypes and optimisers work as ever. It has no cache and the shapes of the example, and the plan says so.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from shardwright.comm import regions
from shardwright.comm.group import Group
from shardwright.parallelize.constants import constants
from shardwright.parallelize.dropout import Dropout
from shardwright.parallelize.flow import named
from shardwright.parallelize.labels import varying
from shardwright.parallelize.placement import Placement
from shardwright.parallelize.planning import Planned
from shardwright.parallelize.sites import differentiable, parameter_of
from shardwright.parallelize.trace import Like, Trace

_aten = torch.ops.aten


@final
class TracedModel(nn.Module):
    """A module with the parameters of `part` under their names, which runs `program`.

    fixed: keywords that were no tensors when the model was traced; they are part of the graph.
    """

    def __init__(self, part: nn.Module, program: GraphModule, fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.fixed = dict(fixed)
        for name, child in part.named_children():
            self.add_module(name, child)
        for name, parameter in part.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in part.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        program.model = self
        self._program = (program,)  # in a tuple, so that it is no child of its own child
        self.train(part.training)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Called as the model was."""
        program = self._program[0]
        for child in program.children():
            if child is not self:
                child.train(self.training)
        return program(*arguments, **(self.fixed | keywords))


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
    """The rank's module running the graph on its parts."""
    program = _copied(trace)
    nodes = {node.name: node for node in program.graph.nodes}
    flow, placement = planned.decision.flow, planned.placement
    for node in trace.graph.graph.nodes:
        if node.op == "call_function" and node.name in nodes:
            wanted = {at: want(placement, group.rank) for at, (_, want) in constants(flow, node).items()}
            here = nodes[node.name]
            here.args = tuple(_replaced(here.args, iter(range(1 << 20)), wanted))
            made = flow.values[node]
            if node.target is _aten.split.Tensor and made is not None:  # by one size, a part of none would be missing
                dim = named(node).get("dim", 0)
                sizes = [placement.size(x, group.rank)[dim] for x in made]
                here.target, here.args = _aten.split_with_sizes.default, (here.args[0], sizes, dim)
            views = ("aten.view.", "aten.reshape.", "aten._unsafe_view.")
            if str(node.target).startswith(views) and isinstance(made, Tensor):
                here.args = (here.args[0], list(placement.size(made, group.rank)))  # of no element -1 says nothing
    _draw(program, trace, planned, group)
    for name, operand in dict.fromkeys(flow.findings.entries):
        original = next(node for node in trace.graph.graph.nodes if node.name == operand)
        if parameter_of(trace, original) is None and differentiable(trace, original):
            copy = nodes.get(f"{operand}/copy") or _after(program, nodes[operand], Collective("copy", group, operand))
            nodes[f"{operand}/copy"] = copy
            nodes[name].replace_input_with(nodes[operand], copy)
    for chain in planned.decision.chains:
        for name in chain.consumers:
            _reduced(program, nodes[name], group)
        for name in chain.exits if gather_output else ():
            labels = flow.findings.exits[name]
            (dim,) = varying(labels)
            widths = tuple(placement.size(labels, rank)[dim] for rank in range(group.size))
            whole = _after(program, nodes[name], Collective("gather", group, name, dim, widths))
            output = next(iter(reversed(program.graph.nodes)))
            output.replace_input_with(nodes[name], whole)
    traced = TracedModel(part, program, {k: v for k, v in trace.inputs[1].items() if not isinstance(v, Like)})
    program.graph.lint()
    program.recompile()
    return traced


def _copied(trace: Trace) -> GraphModule:
    """The graph with what it holds beside the model: constants and graphs within."""
    graph = Graph()
    graph.output(graph.graph_copy(trace.graph.graph, {}))
    program = GraphModule(nn.Module(), Graph())
    for node in graph.nodes:
        target = str(node.target)
        if node.op != "get_attr" or (target.startswith("model.") and _held(trace, target)):
            continue
        held: Any = trace.graph
        for part in target.split("."):
            held = getattr(held, part)
        node.target = target.replace(".", "_") + "_constant"
        if isinstance(held, nn.Module):
            program.add_submodule(node.target, deepcopy(held))
        else:
            program.register_buffer(node.target, held.detach().clone(), persistent=False)
    for node in list(graph.nodes):
        if str(node.target) == "aten._assert_tensor_metadata.default":
            graph.erase_node(node)
    graph.set_codegen(deepcopy(trace.graph.graph._codegen))
    program.graph = graph
    return program


def _held(trace: Trace, target: str) -> bool:
    return target in trace.names or target in trace.buffers


def _replaced(arguments: Any, count: Iterator[int], wanted: Mapping[int, int]) -> Iterator[Any]:
    """The same arguments with the integers at these positions replaced."""
    for one in arguments:
        if isinstance(one, bool):
            yield one
        elif isinstance(one, int):
            yield wanted.get(next(count), one)
        elif isinstance(one, tuple | list):
            yield list(_replaced(one, count, wanted))
        else:
            yield one


def _after(program: GraphModule, node: Node, module: nn.Module) -> Node:
    name = f"{node.name}_{type(module).__name__}".lower()
    program.add_submodule(name, module)
    with program.graph.inserting_after(node):
        return program.graph.call_module(name, (node,))


def _reduced(program: GraphModule, node: Node, group: Group) -> None:
    """Sum a product over the ranks; its bias is added once, after."""
    graph, bias = program.graph, None
    if node.target is _aten.linear.default and len(node.args) > 2:
        bias, node.args = node.args[2], node.args[:2]
    elif node.target is _aten.addmm.default:
        bias, node.args, node.target = node.args[0], node.args[1:], _aten.mm.default
    elif str(node.target).startswith("aten.conv") and len(node.args) > 2:
        bias, node.args = node.args[2], (*node.args[:2], None, *node.args[3:])
    users = list(node.users)
    whole = _after(program, node, Collective("reduce", group, node.name))
    if isinstance(bias, Node) and str(node.target).startswith("aten.conv"):
        with graph.inserting_after(whole):
            bias = graph.call_function(_aten.view.default, (bias, [-1] + [1] * (len(node.meta["val"].shape) - 2)))
        with graph.inserting_after(bias):
            whole, bias = graph.call_function(_aten.add.Tensor, (whole, bias)), None
    if isinstance(bias, Node):
        with graph.inserting_after(whole):
            whole = graph.call_function(_aten.add.Tensor, (whole, bias))
    for user in users:
        user.replace_input_with(node, whole)


def _draw(program: GraphModule, trace: Trace, planned: Planned, group: Group) -> None:
    """Dropout by place in the whole tensor, in training mode only."""
    nodes = {node.name: node for node in program.graph.nodes}
    for node in trace.graph.graph.nodes:
        if str(node.target) != "aten.dropout.default":
            continue
        here = nodes[node.name]
        places = places_of(planned.decision.flow.values[node], planned.placement, group.rank)
        module = Dropout(float(node.args[1]), node.name, places=places)
        whole = _after(program, here, module)
        here.replace_all_uses_with(whole)
        whole.args = (here.args[0],)
        program.graph.erase_node(here)


def places_of(labels: Any, placement: Placement, rank: int) -> dict[int, tuple[Tensor, int]]:
    """For each dim that is cut, from the end: the places this rank holds, and how many there are."""
    if not isinstance(labels, Tensor):
        return {}
    return {dim - labels.dim(): (placement.held_along(labels, dim, rank), labels.shape[dim]) for dim in varying(labels)}
