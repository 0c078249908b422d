"""Whether a rank's operators make of its parts what the labels say: a place must be found where it lies.

Operators that move elements have run on all labels; a rank runs them on its own part. A view keeps the order of what is
there. A roll, a step, a transposition of places that are no box may find others, a value for each head may meet half
a head. Heads that are held once a use are `placement`'s own business.
"""

from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_map

from shardwright.parallelize.constants import constants
from shardwright.parallelize.flow import Flow, named, shape_of
from shardwright.parallelize.labels import Parameter, compact, varying
from shardwright.parallelize.placement import Placement
from shardwright.parallelize.rules import ALONG_ONE, TURNING, is_pointwise, name_of


def misfit(flow: Flow, placement: Placement) -> tuple[Node, list[Tensor], int] | None:
    """The first operator that would find something else on a rank; the labels concerned; the rank."""
    for node in flow.module.graph.nodes:
        if node.op != "call_function":
            continue
        for labels in _moved(flow, node):
            for rank in range(placement.ranks):
                if not _finds(flow, node, labels, placement, rank):
                    return node, [labels], rank
        made = flow.values.get(node)
        if isinstance(made, Tensor) and is_pointwise(node):
            for rank in range(placement.ranks):
                if not _meet(flow, node, made, placement, rank):
                    return node, [made, *flow.reads(node)], rank
    return None


def _moved(flow: Flow, node: Node) -> list[Tensor]:
    """The labels that an operator which looks for places reads along the dims it looks along."""
    if name_of(node) not in (*TURNING, *ALONG_ONE):
        return []
    value = flow.value(node.args[0])
    layers = value.layers if isinstance(value, Parameter) else (value,)
    return [x for x in layers if isinstance(x, Tensor) and (name_of(node) in TURNING or _dim(node) in varying(x))]


def _dim(node: Node) -> int:
    return int(named(node).get("dim", 0)) % len(shape_of(node.args[0]))


def _finds(flow: Flow, node: Node, labels: Tensor, placement: Placement, rank: int) -> bool:
    """Whether the operator on what a rank holds gives what the rank holds of its result."""
    small = labels if name_of(node) == "roll" and not node.args[2:] else compact(labels)
    numbers, target = count(), node.target
    wanted = {at: want(placement, rank) for at, (_, want) in constants(flow, node).items()}
    here = tree_map(lambda x: wanted.get(next(numbers), x) if type(x) is int else x, list(node.args[1:]))
    try:
        mine = placement.part(small, rank)
        if mine is None:
            return True
        found = _tuple(target(mine, *here, **node.kwargs))  # type: ignore[operator]
        whole = _tuple(target(small, *node.args[1:], **node.kwargs))  # type: ignore[operator]
        expected = [placement.part(one, rank) for one in whole]
    except (IndexError, RuntimeError):  # it is not there
        return False
    return len(found) == len(expected) and all(
        one.numel() == 0 if want is None else torch.equal(one.reshape(-1), want.reshape(-1))
        for one, want in zip(found, expected, strict=True)
    )


def _meet(flow: Flow, node: Node, made: Tensor, placement: Placement, rank: int) -> bool:
    """Whether a rank's parts of what is combined element by element have sizes that go together."""
    sizes = []
    for one in node.all_input_nodes:
        value: Any = flow.labels(one, node)
        sizes.append(shape_of(one) if value is None else placement.size(value, rank))
    try:
        return tuple(torch.broadcast_shapes(*sizes)) == placement.size(made, rank)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False


def _tuple(made: Any) -> tuple[Tensor, ...]:
    return tuple(made) if isinstance(made, tuple | list) else (made,)
