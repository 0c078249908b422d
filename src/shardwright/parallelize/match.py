"""Which all-reduces of a traced graph sum a product that may be fused with them. Reads the graph, changes nothing.

A graph from `torch.export` says `product → all_reduce → wait_tensor`, and `→ copy_` into the product where the model
called `dist.all_reduce`, which works in place; `run_decompositions` makes that `copy`. Operators are known by name, so
that no module of `torch.distributed` is needed here.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Node

from shardwright.comm.group import name_of as dtype_name
from shardwright.kernels.operands import FLOATS

ALL_REDUCE = "_c10d_functional.all_reduce"
WAIT = "_c10d_functional.wait_tensor.default"
COPY, COPY_IN_PLACE = "aten.copy.default", "aten.copy_.default"
VIEWS = ("aten.view.default", "aten._unsafe_view.default")
"""What may stand between a product and its all-reduce: a sum over ranks does not care how elements are arranged."""


@dataclass(frozen=True)
class Operands:
    """`x1 @ x2 + bias`; transposed: the node `x2` is `[n, k]`, as a linear's weight is."""

    x1: Node
    x2: Node
    bias: Node | None = None
    transposed: bool = False

    def nodes(self) -> tuple[Node, ...]:
        """All that the product reads."""
        return (self.x1, self.x2) if self.bias is None else (self.x1, self.x2, self.bias)


@dataclass(frozen=True)
class Match:
    """One product and its all-reduce over the process group named `group`: all nodes that go away."""

    product: Node
    operands: Operands
    views: tuple[Node, ...]
    all_reduce: Node
    wait: Node
    copy: Node | None
    group: str

    @property
    def summed(self) -> Node:
        """What the all-reduce is given: the product, or the last view of it."""
        return self.views[-1] if self.views else self.product


def is_all_reduce(node: Node) -> bool:
    """Of any form."""
    return name_of(node).startswith(ALL_REDUCE)


def name_of(node: Node) -> str:
    """`aten.mm.default`, for a call of an operator."""
    return str(node.target)


def match(all_reduce: Node) -> Match | str:
    """The product that this all-reduce sums, or why the two stay as they are."""
    if name_of(all_reduce) != f"{ALL_REDUCE}.default":
        return f"{name_of(all_reduce)} is not a plain all-reduce"
    summed, op, group = all_reduce.args
    if op != "sum" or not isinstance(group, str) or not isinstance(summed, Node):
        return f"it reduces by {op}"
    views, product = _behind(summed)
    operands = _operands(product)
    if isinstance(operands, str):
        return operands
    if overwriting := _overwriting(product, all_reduce, operands):
        return f"{overwriting.name} may overwrite an operand of {product.name} before the all-reduce"
    ending = _ending(all_reduce, summed)
    if isinstance(ending, str):
        return ending
    return Match(product, operands, views, all_reduce, *ending, group)


def _behind(summed: Node) -> tuple[tuple[Node, ...], Node]:
    """The views that nothing else reads, first to last, and what they are views of."""
    views: list[Node] = []
    node = summed
    while name_of(node) in VIEWS and isinstance(node.args[0], Node) and len(node.args[0].users) == 1:
        views.insert(0, node)
        node = node.args[0]
    return tuple(views), node


def _operands(product: Node) -> Operands | str:
    found = _read(product)
    if found is None:
        return f"it sums {product.name}, which is not a matmul"
    values = [node.meta.get("val") for node in (product, *found.nodes())]
    if not all(isinstance(value, Tensor) for value in values):
        return f"the graph does not say the shapes of {product.name}"
    y, x1, x2, *bias = (value for value in values if isinstance(value, Tensor))
    if x1.dim() not in (2, 3) or x2.dim() != 2:
        return f"{product.name} multiplies {_sizes(x1)} by {_sizes(x2)}, not [m, k] or [b, s, k] by [k, n]"
    if bias and (bias[0].dim() != 1 or bias[0].shape[0] != y.shape[-1]):
        return f"{product.name} adds {_sizes(bias[0])}, not [n]"
    if {value.dtype for value in (x1, x2, *bias)} != {y.dtype}:
        return f"{product.name} is of another dtype than its operands"
    if y.dtype not in FLOATS:
        return f"{product.name} is of {dtype_name(y.dtype)}, which the operator does not multiply"
    return found


def _read(product: Node) -> Operands | None:
    """What the operators that multiply have in common."""
    arguments: Any = product.args
    name = name_of(product)
    if name in ("aten.mm.default", "aten.matmul.default"):
        return Operands(*arguments)
    if name == "aten.linear.default":
        x1, x2, *bias = arguments
        return Operands(x1, x2, bias[0] if bias else None, transposed=True)
    if name == "aten.addmm.default" and set(product.kwargs.values()) <= {1}:  # beta and alpha
        bias, x1, x2 = arguments
        return Operands(x1, x2, bias)
    return None


def _ending(all_reduce: Node, summed: Node) -> tuple[Node, Node | None] | str:
    """The wait, and the copy back into the product, given that every other reader of it sees the sum."""
    waits = list(all_reduce.users)
    if len(waits) != 1 or name_of(waits[0]) != WAIT:
        return "its result is used without waiting for it"
    wait = waits[0]
    copies = [user for user in wait.users if name_of(user) in (COPY, COPY_IN_PLACE) and user.args[0] is summed]
    copy = copies[0] if copies else None
    if copy and len(wait.users) > 1:
        return f"its result is read beside {copy.name}, which may change later"
    written = copy if copy and name_of(copy) == COPY_IN_PLACE else None
    for reader in summed.users:
        if reader not in (all_reduce, copy) and (written is None or reader < written):
            return f"{summed.name} is also read by {reader.name}, before it is summed"
    return wait, copy


def _overwriting(product: Node, all_reduce: Node, operands: Operands) -> Node | None:
    """What may write, between the product and its all-reduce, where the product has read."""
    read = set[Node | None]().union(*map(_origins, operands.nodes()))
    node = product.next
    while node is not all_reduce:
        if any(read & _origins(target) for target in _written(node)):
            return node
        node = node.next
    return None


def _written(node: Node) -> list[Node]:
    """The tensors that a node may change: what an operator's schema says; of a graph within the graph all it reads."""
    if isinstance(node.target, HigherOrderOperator):
        return node.all_input_nodes
    if not isinstance(node.target, OpOverload):
        return []
    arguments = node.target._schema.arguments
    given = {**dict(zip((argument.name for argument in arguments), node.args, strict=False)), **node.kwargs}
    writes = (given.get(x.name) for x in arguments if x.alias_info is not None and x.alias_info.is_write)
    return [x for x in writes if isinstance(x, Node)]


def _origins(node: Node) -> set[Node | None]:
    """Whose memory a node may share: new memory of a product or an all-reduce, or (None) of the graph's inputs."""
    origins: set[Node | None] = set()
    seen, rest = set[Node](), [node]
    while rest:
        node = rest.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op in ("placeholder", "get_attr"):
            origins.add(None)
        elif node.op == "call_module" or is_all_reduce(node) or _read(node):
            origins.add(node)
        else:
            rest.extend(node.all_input_nodes)
    return origins


def _sizes(x: Tensor) -> list[Any]:
    return list(x.shape)
