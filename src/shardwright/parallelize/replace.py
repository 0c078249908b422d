"""`replace_matmul_all_reduce`: the products of a user's exported model that an all-reduce follows become one operator.

What may be replaced is decided in `parallelize.match`. This file makes the new module; the old one stays as it was.
"""

import warnings
from copy import deepcopy
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from shardwright.comm import regions
from shardwright.comm.group import Group
from shardwright.comm.torch_group import TorchGroup
from shardwright.errors import UsageError
from shardwright.kernels.matmul_all_reduce import matmul_all_reduce
from shardwright.parallelize.match import WAIT, Match, is_all_reduce, match, name_of


@dataclass(frozen=True)
class Replaced:
    """module: the new one, called as the old was · count: pairs replaced · left: every other all-reduce, and why."""

    module: GraphModule
    count: int
    left: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join([f"{self.count} replaced, {len(self.left)} left", *self.left])


@final
class MatmulAllReduce(nn.Module):
    """A node of the new graph: the operator, with the group it reduces over.

    The gradient is the traced program's: torch's all-reduce sums the ranks' gradients on its way back too.
    """

    def __init__(self, group: Group, tag: str) -> None:
        super().__init__()
        self.group, self.tag = group, tag

    def forward(self, x1: Tensor, x2: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x1 [m, k_r]` or `[b, s, k_r]`, `x2 [k_r, n]`, bias `[n]` → `all_reduce(x1 @ x2 + bias)`."""
        y = matmul_all_reduce(x1, x2, self.group, bias=bias, tag=self.tag)
        return regions.sum_gradients(y, self.group, self.tag)

    def extra_repr(self) -> str:
        """Where among whom."""
        return f"{self.tag}, rank {self.group.rank} of {self.group.size}"


def replace_matmul_all_reduce(exported: ExportedProgram | GraphModule) -> Replaced:
    """Put `matmul_all_reduce` where a model multiplies and then sums over the ranks of a torch process group.

    exported: what `torch.export.export` made of a model in which `dist.all_reduce` (or the functional one) follows
    `torch.matmul`, `F.linear` or `nn.Linear`; or the module of it, before or after `run_decompositions`. It is left as
    it was; the new module shares its parameters. A linear's bias is added before the reduce, as it was: once a rank.

    The new module gives the same results and gradients to rounding, with one all-reduce for each pair as before. Where
    anything but the all-reduce reads the product, where it reduces by another op than sum, or sums what is not a
    product of `[m, k]` or `[b, s, k]` by `[k, n]`, the pair stays as it is, and `left` says why. A warning is given if
    nothing was replaced.

    Raises:
        UsageError: it is neither, or its process group is not one of this process.
    """
    module = _new_module(exported)
    groups: dict[str, Group] = {}
    count, left = 0, []
    for part in [part for part in module.modules() if isinstance(part, GraphModule)]:
        for node in [node for node in part.graph.nodes if is_all_reduce(node)]:
            found = match(node)
            if isinstance(found, str):
                left.append(f"{node.name}: {found}")
                continue
            if found.group not in groups:
                groups[found.group] = TorchGroup.named(found.group)
            _replace(part, found, groups[found.group], f"matmul_all_reduce_{count}")
            count += 1
        part.graph.lint()
        part.recompile()
    if not count:
        reason = "; ".join(left) or "the model has no all-reduce"
        warnings.warn(f"replace_matmul_all_reduce replaced nothing: {reason}", stacklevel=2)
    return Replaced(module, count, tuple(left))


def _replace(module: GraphModule, found: Match, group: Group, name: str) -> None:
    """Where the all-reduce was, so that the ranks' collectives keep their order."""
    graph, operands = module.graph, found.operands
    module.add_submodule(name, MatmulAllReduce(group, found.product.name))
    with graph.inserting_before(found.all_reduce):
        x1, x2, *bias = operands.nodes()
        if operands.transposed:
            x2 = graph.call_function(torch.ops.aten.t.default, (x2,))
        y = graph.call_module(name, (x1, x2, *bias))
        y.meta = dict(found.product.meta)
        for view in found.views:
            y = _on(y, view)
    gone = [found.copy, found.wait, found.all_reduce, *reversed(found.views), found.product]
    for old in (found.copy, found.wait, found.summed):
        if old is not None:
            old.replace_all_uses_with(y)
    for node in gone:
        if node is not None:
            graph.erase_node(node)
    for node in [user for user in y.users if name_of(user) == WAIT]:  # the model waited for what it had waited for
        node.replace_all_uses_with(y)
        graph.erase_node(node)


def _on(x: Node, view: Node) -> Node:
    """The same view of `x`."""
    return x.graph.node_copy(view, lambda node: x if node is view.args[0] else node)


def _new_module(exported: object) -> GraphModule:
    """A module of its own, on the same tensors. What `module()` gives shares the graphs within its graph."""
    module = exported.module() if isinstance(exported, ExportedProgram) else exported
    if not isinstance(module, GraphModule):
        constraint = "an ExportedProgram, or the GraphModule of one"
        raise UsageError("exported", type(exported).__name__, constraint, "pass torch.export.export(model, inputs)")
    shared = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's specs of nested inputs warn of themselves when copied
        return deepcopy(module, shared)
